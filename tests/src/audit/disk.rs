//! Disks that fail as disks do: full, read-only, hanging. They need root.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::identity::{Identity, give};
use crate::process::{output, transcript};
use crate::wait::PATIENCE;

/// A small filesystem at a directory of the broker's. Thawed and unmounted on drop.
#[derive(Debug)]
pub struct Disk {
    mounted: PathBuf,
    image: Option<PathBuf>,
}

impl Disk {
    /// 2 MiB in memory, for filling up.
    ///
    /// # Panics
    /// When it cannot be mounted.
    #[must_use]
    pub fn tiny(at: &Path, owner: &Identity) -> Self {
        let options = format!("size=2m,mode=0700,uid={},gid={}", owner.uid(), owner.gid());
        run(Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(at));
        Self { mounted: at.into(), image: None }
    }

    /// An ext4 in the file `image`, for what only a real one does.
    ///
    /// # Panics
    /// When it cannot be made or mounted.
    #[must_use]
    pub fn ext4(image: &Path, at: &Path, owner: &Identity) -> Self {
        File::create(image).and_then(|file| file.set_len(16 << 20)).expect("room for an image");
        run(Command::new("mkfs.ext4").args(["-q", "-O", "^has_journal"]).arg(image));
        let disk = Self { mounted: at.into(), image: Some(image.into()) };
        disk.mount(image);
        give(at, owner).expect("the owner gets the filesystem");
        fs::set_permissions(at, std::os::unix::fs::PermissionsExt::from_mode(0o700))
            .expect("chmod");
        disk
    }

    fn mount(&self, image: &Path) {
        run(Command::new("mount")
            .args(["-o", "loop,errors=remount-ro"])
            .args([image, &self.mounted]));
    }

    /// Takes all the room that is left.
    ///
    /// # Panics
    /// When there is no room for a file.
    pub fn fill(&self) {
        let mut file = File::create(self.mounted.join("filler")).expect("a filler");
        for size in [4096, 1] {
            while file.write_all(&vec![0; size]).is_ok() {}
        }
    }

    /// Gives the room back.
    ///
    /// # Panics
    /// When it was not taken.
    pub fn free(&self) {
        fs::remove_file(self.mounted.join("filler")).expect("the filler is ours");
    }

    /// Makes the kernel find a fault, so that it turns the filesystem read-only under whoever
    /// has files open, as it does when a disk goes bad.
    ///
    /// # Panics
    /// When the kernel does not.
    pub fn turn_read_only(&self) {
        run(Command::new("sync").arg("--file-system").arg(&self.mounted));
        let mut find = Command::new("findmnt");
        let found = output(find.args(["-no", "SOURCE"]).arg(&self.mounted), PATIENCE);
        let device = transcript(&found);
        let device = device.trim().trim_start_matches("/dev/");
        fs::write(format!("/sys/fs/ext4/{device}/trigger_fs_error"), "1").expect("a fault");
        let probe = File::create(self.mounted.join("probe")).expect_err("it is read-only");
        assert_eq!(probe.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    }

    /// Puts a sound copy of the filesystem in its place.
    ///
    /// # Panics
    /// When that does not work.
    pub fn replace(&mut self) {
        let image = self.image.clone().expect("it has an image");
        let copy = image.with_extension("copy");
        fs::copy(&image, &copy).expect("the image can be copied");
        run(Command::new("umount").arg("--lazy").arg(&self.mounted));
        self.mount(&copy);
    }

    /// Makes every write to it hang.
    ///
    /// # Panics
    /// When it cannot be frozen.
    pub fn freeze(&self) {
        run(Command::new("fsfreeze").arg("-f").arg(&self.mounted));
    }

    /// Lets the writes go on.
    ///
    /// # Panics
    /// When it was not frozen.
    pub fn thaw(&self) {
        run(Command::new("fsfreeze").arg("-u").arg(&self.mounted));
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if self.image.is_some() {
            let _not_frozen = Command::new("fsfreeze").arg("-u").arg(&self.mounted).output();
        }
        let _lazily = Command::new("umount").arg("--lazy").arg(&self.mounted).output();
    }
}

fn run(command: &mut Command) {
    let done = output(command, PATIENCE);
    assert!(done.status.success(), "{command:?}: {}", transcript(&done));
}
