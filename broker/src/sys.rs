//! System calls and machine state that no safe wrapper covers.

#![allow(unsafe_code, reason = "this is where the unsafe parts that are not memory or peers live")]

use std::ffi::{CStr, c_char};
use std::hint::black_box;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd as _, IntoRawFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Child, Command};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{
    Pid, Resource, Rlimit, Signal, getrlimit, set_parent_process_death_signal, setrlimit,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use zeroize::Zeroize;

/// How much stack below the caller is wiped after cryptography: hash states and expanded keys
/// were measured to lie within the first few KiB.
const RESIDUE: usize = 64 * 1024;

unsafe extern "C" {
    /// environ(7).
    static environ: *const *mut c_char;
}

/// Lends the value of an environment variable to `read`. `None` when it is not set.
pub(crate) fn read_env<R>(name: &str, read: impl FnOnce(&[u8]) -> R) -> Option<R> {
    let mut read = Some(read);
    let mut answer = None;
    each_env(|key, value| {
        if key == name.as_bytes()
            && let Some(read) = read.take()
        {
            answer = Some(read(value));
        }
    });
    answer
}

/// Overwrites the value of an environment variable with zeros where it stands, as often as it
/// stands there.
pub(crate) fn wipe_env(name: &str) {
    each_env(|key, value| {
        if key == name.as_bytes() {
            value.zeroize();
        }
    });
}

/// Overwrites every value of environ(7) with zeros where it stands; the names stay. For a
/// process that was forked, whose copy it is.
pub(crate) fn wipe_environment() {
    each_env(|_key, value| value.zeroize());
}

/// Every name and value in environ(7). To be called before there are threads.
fn each_env(mut each: impl FnMut(&[u8], &mut [u8])) {
    let mut entry = {
        // SAFETY: `environ` is set by the C runtime before main and no thread changes it.
        unsafe { environ }
    };
    if entry.is_null() {
        return;
    }
    loop {
        // SAFETY: environ(7) is an array of pointers that a null pointer ends, and the loop
        // stops there.
        let text = unsafe { *entry };
        if text.is_null() {
            return;
        }
        // SAFETY: every entry is a NUL-terminated string.
        let len = unsafe { CStr::from_ptr(text) }.count_bytes();
        // SAFETY: the string is writable memory of this process (execve(2) copies it to the
        // stack), and no other reference to it exists: std copies what it returns.
        let bytes = unsafe { std::slice::from_raw_parts_mut(text.cast::<u8>(), len) };
        if let Some((key, value)) = split_entry(bytes) {
            each(key, value);
        }
        // SAFETY: the entry was not the terminating null pointer, so there is a next one.
        entry = unsafe { entry.add(1) };
    }
}

fn split_entry(entry: &mut [u8]) -> Option<(&[u8], &mut [u8])> {
    let equals = entry.iter().position(|byte| *byte == b'=')?;
    let (key, value) = entry.split_at_mut_checked(equals)?;
    Some((key, value.get_mut(1..)?))
}

/// Writes a line to a pipe, a terminal or a file if that can be done at once, and fails
/// otherwise: whoever reads a log and stalls must not hold up the broker.
///
/// A pipe that polls as writable takes PIPE_BUF bytes without blocking (pipe(7)); longer lines
/// are refused.
pub(crate) fn write_without_waiting(to: &impl AsFd, line: &[u8]) -> io::Result<()> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    if line.len() > rustix::pipe::PIPE_BUF {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut fds = [PollFd::new(to, PollFlags::OUT)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let ready = poll(&mut fds, Some(&now))?;
    let [polled] = &fds;
    if ready == 0 || !polled.revents().contains(PollFlags::OUT) {
        return Err(io::ErrorKind::WouldBlock.into());
    }
    let count = rustix::io::write(to, line)?;
    if count == line.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// Owners of a descriptor.
pub(crate) trait Owning: AsRawFd {}

impl Owning for OwnedFd {}

impl Owning for Arc<OwnedFd> {}

/// Registers a descriptor with the runtime. Gives it back when that cannot be done.
pub(crate) fn register<F: Owning>(fd: F, interest: Interest) -> Result<AsyncFd<F>, (F, io::Error)> {
    // SAFETY: an `OwnedFd` is open and always the same descriptor until whoever owns it drops it,
    // the last of them if they share it, and the `AsyncFd` is one.
    let registered = unsafe { AsyncFd::register_with_interest(fd, interest) };
    registered.map_err(|failed| failed.into_parts())
}

/// How much of what was sent on a Unix socket its peer has not read, in bytes of the kernel's own
/// memory: more than was written, and zero when all is read (SIOCOUTQ; the kernel's
/// unix_ioctl()).
///
/// # Errors
/// When it is no socket.
pub(crate) fn unread_by_peer(socket: BorrowedFd<'_>) -> io::Result<usize> {
    let mut unread: libc::c_int = 0;
    // SAFETY: the request, which is TIOCOUTQ by another name, writes one int to a live one.
    let answer = unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut unread) };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    usize::try_from(unread).map_err(io::Error::other)
}

/// What the kernel knows of a TCP connection (tcp(7), TCP_INFO).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TcpInfo {
    /// As in include/net/tcp_states.h.
    pub(crate) state: u8,
    /// Sent, and acknowledged by the other side.
    pub(crate) sent: u64,
    pub(crate) received: u64,
}

/// TCP_INFO; `None` when the socket is no TCP socket, or the kernel does not count bytes.
pub(crate) fn tcp_info(socket: BorrowedFd<'_>) -> Option<TcpInfo> {
    // include/uapi/linux/tcp.h: eight bytes, 24 words of 32 bits, then words of 64. libc's struct
    // ends before these.
    const BYTES_ACKED: usize = 120;
    const BYTES_RECEIVED: usize = 128;
    let mut info = [0_u8; 256];
    let mut len = libc::socklen_t::try_from(info.len()).ok()?;
    // SAFETY: the option writes at most `len` bytes to a live buffer of that size.
    let answer = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    let known = info.get(..usize::try_from(len).ok()?).filter(|_| answer == 0)?;
    let word = |at: usize| known.get(at..)?.first_chunk().map(|bytes| u64::from_ne_bytes(*bytes));
    let state = *known.first()?;
    Some(TcpInfo { state, sent: word(BYTES_ACKED)?, received: word(BYTES_RECEIVED)? })
}

/// Marks every descriptor above standard error close-on-exec, and closes those above it that
/// are not in `keep` consecutive ones: what was left open by whoever started us is not ours.
pub(crate) fn close_strays(keep: usize) {
    let first = 3 + libc::c_uint::try_from(keep).unwrap_or(0);
    // SAFETY: close_range(2) takes a range and flags. At this point of the start nothing in this
    // process owns a descriptor above standard error. A kernel without it changes nothing.
    let _ = unsafe { libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, 0) };
    let _ = {
        // SAFETY: as above, with CLOSE_RANGE_CLOEXEC, which closes nothing.
        unsafe {
            libc::syscall(
                libc::SYS_close_range,
                3_u32,
                libc::c_uint::MAX,
                libc::CLOSE_RANGE_CLOEXEC,
            )
        }
    };
}

/// Forks a process that runs `child` and ends with the status that it gives, whatever happens in
/// there: it never comes back into the caller's code, and drops nothing of the caller's.
///
/// # Errors
/// When there are other threads, whose locks the new process could never open, or when fork(2)
/// fails.
pub(crate) fn fork_off(child: impl FnOnce() -> u8) -> io::Result<Pid> {
    if std::fs::read_dir("/proc/self/task").is_ok_and(|threads| threads.count() != 1) {
        return Err(io::Error::other("there are other threads already"));
    }
    // SAFETY: this is the only thread, so the new process may do whatever this one may.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let status = catch_unwind(AssertUnwindSafe(child)).unwrap_or(70);
        // SAFETY: _exit(2) does not return; exit handlers and buffers are the other process's.
        unsafe { libc::_exit(status.into()) }
    }
    match Pid::from_raw(pid) {
        Some(pid) if pid.as_raw_pid() > 0 => Ok(pid),
        Some(_) | None => Err(io::Error::last_os_error()),
    }
}

/// Closes every descriptor but standard error and `kept`, which comes back under its new number.
/// Standard input and output lead nowhere. For a process that was forked: whatever of the other
/// process still thinks that it owns a descriptor must not run any more.
pub(crate) fn keep_only(kept: OwnedFd) -> io::Result<OwnedFd> {
    const PLACE: libc::c_int = 3;
    let nothing = std::fs::File::options().read(true).write(true).open("/dev/null")?;
    for standard in [libc::STDIN_FILENO, libc::STDOUT_FILENO] {
        // SAFETY: dup2(2) takes two numbers, and nothing here owns standard input or output.
        if unsafe { libc::dup2(nothing.as_raw_fd(), standard) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    drop(nothing);
    if kept.as_raw_fd() != PLACE {
        // SAFETY: dup3(2) takes two numbers and flags; whoever owned the place does not run in
        // this process.
        if unsafe { libc::dup3(kept.as_raw_fd(), PLACE, libc::O_CLOEXEC) } < 0 {
            return Err(io::Error::last_os_error());
        }
        drop(kept);
    } else {
        // It stays what it is, under an owner made below.
        let _ = kept.into_raw_fd();
    }
    // SAFETY: close_range(2) takes a range and flags; nothing in this process uses these.
    let closed = unsafe { libc::syscall(libc::SYS_close_range, PLACE + 1, libc::c_uint::MAX, 0) };
    if closed != 0 {
        close_one_by_one(PLACE)?;
    }
    // SAFETY: the descriptor is open, and this is its only owner.
    Ok(unsafe { OwnedFd::from_raw_fd(PLACE) })
}

/// For kernels before 5.9, which have no close_range(2).
fn close_one_by_one(last_kept: libc::c_int) -> io::Result<()> {
    let names = std::fs::read_dir("/proc/self/fd")?.flatten().map(|entry| entry.file_name());
    let open: Vec<libc::c_int> = names.filter_map(|name| name.to_str()?.parse().ok()).collect();
    for fd in open.into_iter().filter(|fd| *fd > last_kept) {
        // SAFETY: close(2) takes a number; nothing in this process uses it. The descriptor of
        // the directory read above is among them and closed already, which is an error and no
        // harm.
        let _ = unsafe { libc::close(fd) };
    }
    Ok(())
}

/// Signals by which service managers and terminals ask a process to end.
const TERMINATION: [libc::c_int; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT];

/// Ignores the signals that ask a process to end.
pub(crate) fn ignore_termination() {
    for signal in TERMINATION {
        // SAFETY: SIG_IGN runs no code of ours.
        let _ = unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}

/// Starts a program that is killed when this process ends, with signals and the number of
/// descriptors as programs expect them, and not as this process has set them for itself.
pub(crate) fn spawn_tied(command: &mut Command) -> io::Result<Child> {
    let parent = rustix::process::getpid();
    let prepare = move || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // The parent may have ended before that was set.
        if rustix::process::getppid() != Some(parent) {
            return Err(io::ErrorKind::NotConnected.into());
        }
        for signal in TERMINATION {
            // SAFETY: SIG_DFL runs no code of ours.
            let _ = unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
        let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
        let current = Some(current.unwrap_or(u64::MAX).min(1024));
        let _ = setrlimit(Resource::Nofile, Rlimit { current, maximum });
        Ok(())
    };
    // SAFETY: between fork and exec the closure does system calls only: it allocates nothing,
    // takes no lock, and is safe in a signal handler's sense (signal-safety(7)).
    unsafe { command.pre_exec(prepare) };
    command.spawn()
}

/// Returns when there may be something to read, or its end; in a runtime.
pub(crate) async fn readable(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: a borrowed descriptor is open and the same for as long as it is borrowed, which is
    // longer than the registration, for that is dropped with this future.
    let waits = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?;
    waits.readable().await.map(drop)
}

/// Socket activation (sd_listen_fds(3)): the descriptors that the service manager passed to this
/// process, by name, close-on-exec. To be called once, first thing in the process.
pub(crate) fn inherited_sockets() -> io::Result<Vec<(String, OwnedFd)>> {
    let mut sockets = Vec::new();
    for (fd, name) in sd_notify::listen_fds_with_names()? {
        // SAFETY: LISTEN_PID is ours (nothing is given otherwise), and nothing else in this
        // process takes these descriptors over.
        sockets.push((name, unsafe { OwnedFd::from_raw_fd(fd) }));
    }
    Ok(sockets)
}

/// Runs `work`, which computes with secrets, and then wipes the stack it used and the vector
/// registers. It must be synchronous: at an `.await` the registers would already be elsewhere.
#[inline(never)]
pub(crate) fn leaving_no_residue<R>(work: impl FnOnce() -> R) -> R {
    let answer = on_a_frame_of_its_own(work);
    wipe_stack();
    wipe_vector_registers();
    answer
}

#[inline(never)]
fn on_a_frame_of_its_own<R>(work: impl FnOnce() -> R) -> R {
    black_box(work())
}

/// Overwrites the stack below the caller's frame: this frame is laid where `work` had its own.
#[inline(never)]
fn wipe_stack() {
    let mut below = [0xA5_u8; RESIDUE];
    black_box(&mut below);
    below.fill(0);
    black_box(&below);
}

#[cfg(target_arch = "x86_64")]
fn wipe_vector_registers() {
    use std::arch::asm;
    if std::arch::is_x86_feature_detected!("avx512f") {
        // SAFETY: the processor has AVX-512, and every register that is changed is declared.
        unsafe {
            asm!(
                "vpxord zmm16, zmm16, zmm16", "vpxord zmm17, zmm17, zmm17",
                "vpxord zmm18, zmm18, zmm18", "vpxord zmm19, zmm19, zmm19",
                "vpxord zmm20, zmm20, zmm20", "vpxord zmm21, zmm21, zmm21",
                "vpxord zmm22, zmm22, zmm22", "vpxord zmm23, zmm23, zmm23",
                "vpxord zmm24, zmm24, zmm24", "vpxord zmm25, zmm25, zmm25",
                "vpxord zmm26, zmm26, zmm26", "vpxord zmm27, zmm27, zmm27",
                "vpxord zmm28, zmm28, zmm28", "vpxord zmm29, zmm29, zmm29",
                "vpxord zmm30, zmm30, zmm30", "vpxord zmm31, zmm31, zmm31",
                out("xmm16") _, out("xmm17") _, out("xmm18") _, out("xmm19") _,
                out("xmm20") _, out("xmm21") _, out("xmm22") _, out("xmm23") _,
                out("xmm24") _, out("xmm25") _, out("xmm26") _, out("xmm27") _,
                out("xmm28") _, out("xmm29") _, out("xmm30") _, out("xmm31") _,
                options(nomem, nostack, preserves_flags)
            );
        }
    }
    if std::arch::is_x86_feature_detected!("avx") {
        // SAFETY: the processor has AVX; vzeroall clears the sixteen registers declared here.
        unsafe {
            asm!(
                "vzeroall",
                out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
                out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
                out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
                out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
                options(nomem, nostack, preserves_flags)
            );
        }
    } else {
        // SAFETY: every x86_64 processor has SSE2, and the registers are declared.
        unsafe {
            asm!(
                "pxor xmm0, xmm0", "pxor xmm1, xmm1", "pxor xmm2, xmm2", "pxor xmm3, xmm3",
                "pxor xmm4, xmm4", "pxor xmm5, xmm5", "pxor xmm6, xmm6", "pxor xmm7, xmm7",
                "pxor xmm8, xmm8", "pxor xmm9, xmm9", "pxor xmm10, xmm10", "pxor xmm11, xmm11",
                "pxor xmm12, xmm12", "pxor xmm13, xmm13", "pxor xmm14, xmm14", "pxor xmm15, xmm15",
                out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
                out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
                out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
                out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
                options(nomem, nostack, preserves_flags)
            );
        }
    }
}

#[cfg(target_arch = "aarch64")]
fn wipe_vector_registers() {
    use std::arch::asm;
    // SAFETY: every aarch64 processor that runs Linux has NEON, and the registers are declared.
    unsafe {
        asm!(
            "movi v0.2d, #0", "movi v1.2d, #0", "movi v2.2d, #0", "movi v3.2d, #0",
            "movi v4.2d, #0", "movi v5.2d, #0", "movi v6.2d, #0", "movi v7.2d, #0",
            "movi v16.2d, #0", "movi v17.2d, #0", "movi v18.2d, #0", "movi v19.2d, #0",
            "movi v20.2d, #0", "movi v21.2d, #0", "movi v22.2d, #0", "movi v23.2d, #0",
            "movi v24.2d, #0", "movi v25.2d, #0", "movi v26.2d, #0", "movi v27.2d, #0",
            "movi v28.2d, #0", "movi v29.2d, #0", "movi v30.2d, #0", "movi v31.2d, #0",
            out("v0") _, out("v1") _, out("v2") _, out("v3") _,
            out("v4") _, out("v5") _, out("v6") _, out("v7") _,
            out("v16") _, out("v17") _, out("v18") _, out("v19") _,
            out("v20") _, out("v21") _, out("v22") _, out("v23") _,
            out("v24") _, out("v25") _, out("v26") _, out("v27") _,
            out("v28") _, out("v29") _, out("v30") _, out("v31") _,
            options(nomem, nostack, preserves_flags)
        );
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn wipe_vector_registers() {}

/// Sends the calling thread SIGUSR1, so that the kernel lays its registers on its stack.
#[cfg(test)]
pub(crate) fn interrupt_this_thread() {
    // SAFETY: raise(3) takes a number; the caller has a handler for it.
    let sent = unsafe { libc::raise(libc::SIGUSR1) };
    assert_eq!(sent, 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_environment_variable_is_wiped_where_it_stands() {
        // PATH would be missed by other tests of this process; this one is set by cargo.
        let name = "CARGO_PKG_DESCRIPTION";
        assert!(!read_env(name, <[u8]>::to_vec).unwrap().is_empty());
        wipe_env(name);
        assert_eq!(read_env(name, <[u8]>::to_vec), Some(Vec::new()));
        assert_eq!(std::env::var(name).as_deref(), Ok(""));
    }

    #[test]
    fn the_kernel_counts_bytes_and_tells_who_ended() {
        use std::io::{Read as _, Write as _};
        use std::net::{Shutdown, TcpListener, TcpStream};

        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut theirs, _) = listener.accept().unwrap();
        ours.write_all(&[7; 1000]).unwrap();
        theirs.read_exact(&mut [0; 1000]).unwrap();
        theirs.write_all(&[7; 300]).unwrap();
        ours.read_exact(&mut [0; 300]).unwrap();
        let info = tcp_info(ours.as_fd()).unwrap();
        // The SYN counts as a byte in some kernels.
        assert!((1000..=1001).contains(&info.sent) && info.received == 300, "{info:?}");
        assert_eq!(info.state, 1);
        theirs.shutdown(Shutdown::Write).unwrap();
        assert_eq!(ours.read(&mut [0]).unwrap(), 0);
        assert_eq!(tcp_info(ours.as_fd()).unwrap().state, 8, "CLOSE_WAIT");
        let (one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        assert_eq!(tcp_info(one.as_fd()), None);
    }

    #[test]
    fn a_variable_that_is_not_set_is_none() {
        assert_eq!(read_env("CREDBROKER_NOT_SET", <[u8]>::len), None);
    }

    #[test]
    fn a_pipe_that_nobody_reads_is_refused_and_not_waited_for() {
        let (reader, writer) = std::io::pipe().unwrap();
        let line = [b'x'; 4096];
        let taken = (0..1000).take_while(|_| write_without_waiting(&writer, &line).is_ok()).count();
        assert!((1..1000).contains(&taken), "{taken}");
        drop(reader);
    }

    #[test]
    fn the_answer_comes_back_through_the_wipe() {
        assert_eq!(leaving_no_residue(|| 6 * 7), 42);
    }

    /// Lays a text into two vector registers, one of each half, without a copy in memory: it is
    /// given with every bit turned round.
    #[cfg(target_arch = "x86_64")]
    #[inline(never)]
    fn load_registers(turned: &[u8; 16]) {
        use std::arch::asm;
        // SAFETY: SSE2 is always there, the 16 bytes are readable, the registers are declared.
        unsafe {
            asm!(
                "pcmpeqd xmm6, xmm6", "movdqu xmm7, [{0}]", "pxor xmm7, xmm6",
                in(reg) turned, out("xmm6") _, out("xmm7") _,
                options(readonly, nostack, preserves_flags)
            );
        }
        if std::arch::is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has AVX-512; the rest as above.
            unsafe {
                asm!(
                    "vbroadcasti32x4 zmm20, [{0}]", "vpternlogd zmm20, zmm20, zmm20, 0x55",
                    in(reg) turned, out("xmm20") _,
                    options(readonly, nostack, preserves_flags)
                );
            }
        }
    }

    /// A signal makes the kernel lay all registers on the stack, where they can be searched for.
    #[cfg(target_arch = "x86_64")]
    #[test]
    fn no_vector_register_keeps_what_was_computed_with() {
        use std::hint::black_box;

        use tokio::signal::unix::{SignalKind, signal};

        use crate::isolated;

        let name = "sys::tests::no_vector_register_keeps_what_was_computed_with";
        let Some(role) = isolated::role() else {
            let found = |role| {
                let done = isolated::again(name, role);
                assert!(done.success, "{}", done.said);
                done.said.lines().filter(|line| *line == "found").count()
            };
            assert_eq!(found("wiped"), 0);
            // The control, of each half where there are two.
            let halves = if std::arch::is_x86_feature_detected!("avx512f") { 2 } else { 1 };
            assert!(found("left") >= halves);
            return;
        };
        // Of random bytes; the text itself must stand nowhere.
        let turned = 0x7d1f_c23a_9e04_b586_41f7_0d9b_e25c_83a6_u128.to_be_bytes();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let _entered = runtime.enter();
        let _handled = signal(SignalKind::user_defined1()).unwrap();
        let load_and_be_interrupted = || {
            // Far down the stack, where nothing that is called afterwards gets to.
            let space = black_box([0_u8; 64 * 1024]);
            if role == "wiped" {
                leaving_no_residue(|| load_registers(&turned));
            } else {
                load_registers(&turned);
            }
            interrupt_this_thread();
            black_box(space);
        };
        black_box(load_and_be_interrupted)();
        println!();
        isolated::copies(&[turned.to_vec()]).iter().for_each(|_| println!("found"));
    }
}
