//! Secrets on their way to the broker and back: the contents of a memfd, and as little else as
//! can be.
//!
//! Invariants: a secret is copied from descriptor to descriptor by the kernel where the source
//! allows it; every buffer of this process that it passes through is wiped; nothing here is
//! mapped, so that whoever else has the memfd cannot raise SIGBUS by shortening it.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use credbroker_proto::{MAX_SECRET, v1};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_get_seals, fstat, memfd_create, sendfile};
use rustix::io::{Errno, pread, pwrite, read, write};
use rustix::pipe::{SpliceFlags, splice};
use thiserror::Error;
use zeroize::Zeroizing;

use crate::Error;

const REDACTED: &str = "[REDACTED]";
/// One more than a secret may have, to see that there is more.
const TOO_MUCH: usize = MAX_SECRET + 1;
const ZEROS: [u8; MAX_SECRET] = [0; MAX_SECRET];

/// Why there is no [`Secret`]. The text repeats nothing of it.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SecretError {
    /// There was nothing to read.
    #[error("the secret is empty")]
    Empty,
    /// There was more than the broker takes.
    #[error("the secret is longer than {MAX_SECRET} bytes")]
    TooLong,
    /// The operating system refused to read, or to give memory.
    #[error("the secret cannot be read: {0}")]
    Io(#[from] io::Error),
}

/// A secret for [`PacketClient::register`](crate::PacketClient::register) or
/// [`AdminPacketClient::put`](crate::AdminPacketClient::put): 1 to 16384 bytes in a memfd, wiped
/// on drop. The broker wipes what it has taken.
///
/// It cannot be read back, copied or printed.
///
/// ```compile_fail,E0599
/// let secret = credbroker_client::Secret::from_bytes(b"x".to_vec()).unwrap();
/// let copy = secret.clone(); // a secret is not `Clone`
/// ```
pub struct Secret(Memory);

impl Secret {
    /// Reads `from` to its end, blocking the thread. From a file or a pipe, the bytes pass
    /// through no buffer of this process.
    ///
    /// # Errors
    /// [`SecretError`].
    pub fn read(from: impl AsFd) -> Result<Self, SecretError> {
        let mut memory = Memory::new()?;
        while memory.length < TOO_MUCH {
            match memory.take(from.as_fd(), TOO_MUCH - memory.length)? {
                0 => break,
                count => memory.length += count,
            }
        }
        memory.checked().map(Self)
    }

    /// Takes `bytes` and wipes them. What other buffers they passed through is the caller's to
    /// know: [`Secret::read`] needs none.
    ///
    /// # Errors
    /// [`SecretError`]; they are wiped nevertheless.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, SecretError> {
        let bytes = Zeroizing::new(bytes);
        if bytes.len() > MAX_SECRET {
            return Err(SecretError::TooLong);
        }
        let mut memory = Memory::new()?;
        memory.append(&bytes)?;
        memory.checked().map(Self)
    }

    /// To be sent.
    pub(crate) fn lend(mut self) -> Lent {
        self.0.wipe_on_drop = false;
        Lent(self.0)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Secret").field(&format_args!("{REDACTED}")).finish()
    }
}

/// A secret that the broker may be reading.
///
/// Wiped only by [`Lent::settle`]: had a request been given up and its memory wiped while the
/// broker was about to read it, zeros would be stored as the credential. The kernel takes the
/// memory back with the last descriptor.
pub(crate) struct Lent(Memory);

impl Lent {
    /// The broker has answered: it will not read any more.
    pub(crate) fn settle(self) {
        self.0.wipe();
    }
}

impl AsFd for Lent {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.fd.as_fd()
    }
}

/// A credential that the broker has revealed, wiped on drop.
pub struct Revealed {
    username: String,
    credential_version: u64,
    secret: Memory,
}

impl Revealed {
    pub(crate) fn from_wire(response: v1::RevealResponse, memfd: OwnedFd) -> Result<Self, Error> {
        let wrong = |what| Error::protocol(format!("the revealed secret {what}"));
        let seals = fcntl_get_seals(&memfd).map_err(|_errno| wrong("is in no memfd"))?;
        // Who could shorten or lengthen it could also move it away from what is wiped.
        if !seals.contains(SealFlags::SHRINK | SealFlags::GROW) {
            return Err(wrong("can change its size"));
        }
        let length = usize::try_from(response.length).unwrap_or(usize::MAX);
        let size = fstat(&memfd).map_err(|_errno| wrong("has no size"))?.st_size;
        let fits = usize::try_from(size).is_ok_and(|size| length <= size);
        if !(1..=MAX_SECRET).contains(&length) || !fits {
            return Err(wrong("has a wrong length"));
        }
        Ok(Self {
            username: response.username,
            credential_version: response.credential_version,
            secret: Memory { fd: memfd, length, wipe_on_drop: true },
        })
    }

    /// The database role.
    #[must_use]
    pub fn username(&self) -> &str {
        &self.username
    }

    /// The version of the credential.
    #[must_use]
    pub fn credential_version(&self) -> u64 {
        self.credential_version
    }

    /// Lends the secret to `work`, in a buffer that is wiped after it. Whatever `work` copies is
    /// the caller's to wipe.
    ///
    /// # Errors
    /// [`SecretError::Io`], which a memfd does not give in practice.
    pub fn expose<T>(&self, work: impl FnOnce(&[u8]) -> T) -> Result<T, SecretError> {
        // Exactly as long as it must be: growing would leave a copy behind.
        let mut buffer = Zeroizing::new(vec![0; self.secret.length]);
        let mut filled = 0;
        while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            let offset = filled.try_into().map_err(io::Error::other)?;
            let read = retry(|| pread(&self.secret.fd, &mut *rest, offset));
            match read.map_err(io::Error::from)? {
                0 => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                count => filled += count,
            }
        }
        Ok(work(&buffer))
    }
}

impl fmt::Debug for Revealed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Revealed")
            .field("username", &self.username)
            .field("credential_version", &self.credential_version)
            .field("secret", &format_args!("{REDACTED}"))
            .finish()
    }
}

struct Memory {
    fd: OwnedFd,
    length: usize,
    wipe_on_drop: bool,
}

impl Memory {
    /// Sealing stays possible and none is set: the broker refuses what it cannot wipe.
    fn new() -> io::Result<Self> {
        let fd =
            memfd_create("credbroker-secret", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        Ok(Self { fd, length: 0, wipe_on_drop: true })
    }

    /// Moves at most `most` bytes from `source` to the end, by whatever call its kind allows.
    fn take(&self, source: BorrowedFd<'_>, most: usize) -> io::Result<usize> {
        loop {
            // A file, then a pipe, then all else: each call refuses what it is not for.
            let taken = sendfile(&self.fd, source, None, most)
                .or_else(|error| only_unsuited(error)?.splice(self, source, most))
                .or_else(|error| only_unsuited(error)?.copy(self, source, most));
            match taken {
                Err(Errno::INTR) => {}
                // Standard input may be shared with somebody who made it non-blocking.
                Err(Errno::AGAIN) => {
                    retry(|| poll(&mut [PollFd::new(&source, PollFlags::IN)], None))?;
                }
                Err(error) => return Err(error.into()),
                Ok(count) => return Ok(count),
            }
        }
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        write_all(&self.fd, bytes)?;
        self.length += bytes.len();
        Ok(())
    }

    /// Wiped when it is refused.
    fn checked(self) -> Result<Self, SecretError> {
        match self.length {
            0 => Err(SecretError::Empty),
            1..=MAX_SECRET => Ok(self),
            _ => Err(SecretError::TooLong),
        }
    }

    /// Fails only when somebody has sealed it against writing, and then nothing can be done.
    fn wipe(&self) {
        let mut wiped = 0;
        while let Some(left) = self.length.checked_sub(wiped)
            && let Some(zeros) = ZEROS.get(..left.min(ZEROS.len()))
            && let Ok(offset) = wiped.try_into()
            && let Ok(count @ 1..) = retry(|| pwrite(&self.fd, zeros, offset))
        {
            wiped += count;
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.wipe_on_drop {
            self.wipe();
        }
    }
}

/// The next way to move bytes.
struct Unsuited;

/// Whether a call refused the kind of the source, and not the work.
fn only_unsuited(error: Errno) -> Result<Unsuited, Errno> {
    match error {
        Errno::INVAL | Errno::SPIPE | Errno::NOSYS | Errno::OPNOTSUPP => Ok(Unsuited),
        other => Err(other),
    }
}

impl Unsuited {
    fn splice(self, to: &Memory, source: BorrowedFd<'_>, most: usize) -> rustix::io::Result<usize> {
        splice(source, None, &to.fd, None, most, SpliceFlags::empty())
    }

    fn copy(self, to: &Memory, source: BorrowedFd<'_>, most: usize) -> rustix::io::Result<usize> {
        let mut buffer = Zeroizing::new([0_u8; 4096]);
        let room = most.min(buffer.len());
        let Some(room) = buffer.get_mut(..room) else { return Ok(0) };
        let count = read(source, &mut *room)?;
        write_all(&to.fd, room.get(..count).unwrap_or_default())?;
        Ok(count)
    }
}

fn write_all(to: &OwnedFd, mut bytes: &[u8]) -> rustix::io::Result<()> {
    while !bytes.is_empty() {
        let count = retry(|| write(to, bytes))?;
        bytes = bytes.get(count..).unwrap_or_default();
    }
    Ok(())
}

fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    rustix::io::retry_on_intr(&mut call)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Seek as _, Write as _};
    use std::os::unix::net::UnixStream;
    use std::thread;

    use rustix::fs::{OFlags, fcntl_add_seals, fcntl_getfl, fcntl_setfl, ftruncate};
    use rustix::io::{FdFlags, fcntl_getfd};

    use super::*;

    const PASSWORD: &[u8] = b"app:correct horse";

    fn contents(fd: impl AsFd) -> Vec<u8> {
        let mut buffer = vec![0; 2 * MAX_SECRET];
        let count = pread(fd, &mut buffer[..], 0).unwrap();
        buffer.truncate(count);
        buffer
    }

    fn file_of(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file.rewind().unwrap();
        file
    }

    fn pipe_of(bytes: &[u8]) -> OwnedFd {
        let (from, to) = rustix::pipe::pipe().unwrap();
        let bytes = bytes.to_vec();
        thread::spawn(move || File::from(to).write_all(&bytes));
        from
    }

    fn socket_of(bytes: &[u8]) -> UnixStream {
        let (from, mut to) = UnixStream::pair().unwrap();
        let bytes = bytes.to_vec();
        thread::spawn(move || to.write_all(&bytes));
        from
    }

    #[test]
    fn it_is_read_whole_from_a_file_a_pipe_and_a_socket() {
        for length in [1, 17, 4096, 4097, MAX_SECRET] {
            let bytes: Vec<u8> = (0..=255).cycle().take(length).collect();
            for secret in [
                Secret::read(file_of(&bytes)).unwrap(),
                Secret::read(pipe_of(&bytes)).unwrap(),
                Secret::read(socket_of(&bytes)).unwrap(),
                Secret::from_bytes(bytes.clone()).unwrap(),
            ] {
                assert!(contents(&secret.0.fd) == bytes, "{length}");
            }
        }
    }

    #[test]
    fn nothing_and_too_much_are_refused() {
        for bytes in [vec![], vec![7; MAX_SECRET + 1], vec![7; 1 << 20]] {
            let expect_empty = bytes.is_empty();
            for error in [
                Secret::read(file_of(&bytes)).unwrap_err(),
                Secret::read(pipe_of(&bytes)).unwrap_err(),
                Secret::read(socket_of(&bytes)).unwrap_err(),
                Secret::from_bytes(bytes).unwrap_err(),
            ] {
                let empty = matches!(error, SecretError::Empty);
                assert!(empty == expect_empty && (empty || matches!(error, SecretError::TooLong)));
            }
        }
    }

    #[test]
    fn a_source_that_is_not_ready_is_waited_for() {
        let (from, to) = rustix::pipe::pipe().unwrap();
        fcntl_setfl(&from, fcntl_getfl(&from).unwrap() | OFlags::NONBLOCK).unwrap();
        let reader = thread::spawn(move || Secret::read(from).unwrap());
        let mut to = File::from(to);
        to.write_all(b"app:").unwrap();
        thread::yield_now();
        to.write_all(b"correct horse").unwrap();
        drop(to);
        assert_eq!(contents(&reader.join().unwrap().0.fd), PASSWORD);
    }

    #[test]
    fn the_memfd_is_as_the_broker_wants_it() {
        let secret = Secret::from_bytes(PASSWORD.to_vec()).unwrap();
        let fd = &secret.0.fd;
        assert_eq!(fcntl_get_seals(fd).unwrap(), SealFlags::empty(), "supported, none set");
        assert_eq!(fcntl_getfl(fd).unwrap() & OFlags::RWMODE, OFlags::RDWR);
        assert!(fcntl_getfd(fd).unwrap().contains(FdFlags::CLOEXEC));
        assert_eq!(fstat(fd).unwrap().st_size, 17);
    }

    #[test]
    fn it_is_wiped_on_drop_and_once_the_broker_has_answered() {
        let copy_of = |memory: &Memory| memory.fd.try_clone().unwrap();
        let zeros = vec![0; PASSWORD.len()];

        let secret = Secret::from_bytes(PASSWORD.to_vec()).unwrap();
        let copy = copy_of(&secret.0);
        assert_eq!(contents(&copy), PASSWORD);
        drop(secret);
        assert_eq!(contents(&copy), zeros);

        let lent = Secret::from_bytes(PASSWORD.to_vec()).unwrap().lend();
        let copy = copy_of(&lent.0);
        lent.settle();
        assert_eq!(contents(&copy), zeros);
    }

    #[test]
    fn what_the_broker_may_still_read_is_left_alone() {
        let lent = Secret::from_bytes(PASSWORD.to_vec()).unwrap().lend();
        let copy = lent.0.fd.try_clone().unwrap();
        drop(lent);
        assert_eq!(contents(&copy), PASSWORD);
    }

    fn memfd(bytes: &[u8], seals: SealFlags) -> OwnedFd {
        let fd = memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        write_all(&fd, bytes).unwrap();
        fcntl_add_seals(&fd, seals).unwrap();
        fd
    }

    fn revealed(length: u32, fd: OwnedFd) -> Result<Revealed, Error> {
        let username = "app".into();
        Revealed::from_wire(v1::RevealResponse { username, length, credential_version: 3 }, fd)
    }

    #[test]
    fn a_revealed_secret_is_lent_and_wiped() {
        let size = SealFlags::SHRINK | SealFlags::GROW;
        let fd = memfd(b"hunter2 and room to spare", size);
        let copy = fd.try_clone().unwrap();
        let secret = revealed(7, fd).unwrap();
        assert_eq!((secret.username(), secret.credential_version()), ("app", 3));
        assert!(secret.expose(|bytes| bytes == b"hunter2").unwrap());
        assert!(secret.expose(|bytes| bytes == b"hunter2").unwrap(), "as often as one likes");
        drop(secret);
        assert_eq!(contents(&copy)[..7], [0; 7]);
    }

    #[test]
    fn what_is_not_a_sealed_memfd_of_that_length_is_refused() {
        let size = SealFlags::SHRINK | SealFlags::GROW;
        for (length, fd) in [
            (0, memfd(b"hunter2", size)),
            (8, memfd(b"hunter2", size)),
            (16385, memfd(&[7; 20_000], size)),
            (7, memfd(b"hunter2", SealFlags::GROW)),
            (7, file_of(b"hunter2").into()),
            (7, socket_of(b"hunter2").into()),
        ] {
            let error = revealed(length, fd).unwrap_err();
            assert!(matches!(error, Error::Protocol { .. }), "{error}");
        }
        let sparse = memfd(b"", SealFlags::empty());
        ftruncate(&sparse, 1 << 40).unwrap();
        fcntl_add_seals(&sparse, size).unwrap();
        assert!(revealed(7, sparse).unwrap().expose(|bytes| bytes == [0; 7]).unwrap());
    }

    #[test]
    fn neither_is_printed() {
        let secret = Secret::from_bytes(PASSWORD.to_vec()).unwrap();
        assert_eq!(format!("{secret:?}"), "Secret([REDACTED])");
        let revealed = revealed(7, memfd(b"hunter2", SealFlags::SHRINK | SealFlags::GROW));
        let text = format!("{:?}", revealed.unwrap());
        assert!(text.contains("[REDACTED]") && !text.contains("hunter2"), "{text}");
    }
}
