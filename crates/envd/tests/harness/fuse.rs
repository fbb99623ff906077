//! A file system that the test serves itself, or does not serve.

use std::{
    fs::File,
    io::{Read, Write},
    os::fd::AsRawFd,
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// The mount, in a mount namespace of this thread and of what it starts.
pub(crate) struct Mount {
    directory: tempfile::TempDir,
    device: File,
}

/// What the kernel asks for.
pub(crate) struct Request<'a>(&'a [u8]);

/// The error and the body of an answer; no body means no answer.
pub(crate) type Answer = (i32, Option<Vec<u8>>);

impl Request<'_> {
    pub(crate) fn operation(&self) -> u32 {
        self.word(4)
    }

    /// What the answer must name.
    pub(crate) fn number(&self) -> [u8; 8] {
        self.0[8..16].try_into().unwrap()
    }

    /// The file that it is about.
    pub(crate) fn node(&self) -> u64 {
        self.long(16)
    }

    /// What follows the head.
    pub(crate) fn argument(&self) -> &[u8] {
        &self.0[40..]
    }

    pub(crate) fn word(&self, at: usize) -> u32 {
        u32::from_ne_bytes(self.0[at..at + 4].try_into().unwrap())
    }

    pub(crate) fn long(&self, at: usize) -> u64 {
        u64::from_ne_bytes(self.0[at..at + 8].try_into().unwrap())
    }
}

impl Mount {
    /// None where a test that needs one is to be skipped, which it says.
    #[allow(clippy::print_stdout, reason = "that is how a test says that it is skipped")]
    pub(crate) fn new() -> Option<Self> {
        let device = match File::options().read(true).write(true).open("/dev/fuse") {
            Ok(device) => device,
            Err(error) => {
                println!("skipped: no FUSE here: {error}");
                return None;
            }
        };
        let directory = tempfile::tempdir().unwrap();
        super::mounts::separate();
        let data = format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other", device.as_raw_fd());
        mount(Some("test"), directory.path(), Some("fuse"), MsFlags::empty(), Some(&*data)).unwrap();
        Some(Self { directory, device })
    }

    pub(crate) fn path(&self) -> String {
        self.directory.path().to_str().unwrap().to_owned()
    }

    /// The kernel's end: for answers that come later.
    pub(crate) fn device(&self) -> File {
        self.device.try_clone().unwrap()
    }

    /// Answers what is asked, until the mount ends.
    pub(crate) fn serve(&self, mut answer: impl FnMut(&Request<'_>) -> Answer + Send + 'static) {
        let mut device = self.device();
        std::thread::spawn(move || {
            let mut request = vec![0; 1 << 17];
            while let Ok(length) = device.read(&mut request) {
                let request = Request(&request[..length]);
                if let (error, Some(body)) = answer(&request) {
                    reply(&mut device, request.number(), error, &body);
                }
            }
        });
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = umount2(self.directory.path(), MntFlags::MNT_DETACH);
    }
}

/// Answers what has this number. Where nobody waits for it any more, nobody gets it.
pub(crate) fn reply(device: &mut File, number: [u8; 8], error: i32, body: &[u8]) {
    let total = u32::try_from(16 + body.len()).unwrap();
    let head = [total.to_ne_bytes(), error.to_ne_bytes()].concat();
    let _ = device.write_all(&[&head, number.as_slice(), body].concat());
}

pub(crate) fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// The attributes of a file.
pub(crate) fn attributes(node: u64, mode: u32, size: u64) -> Vec<u8> {
    let mut attributes = words(&[0; 22]);
    attributes[..8].copy_from_slice(&node.to_ne_bytes());
    attributes[8..16].copy_from_slice(&size.to_ne_bytes());
    attributes[60..64].copy_from_slice(&mode.to_ne_bytes());
    attributes[64] = 1;
    attributes
}

/// An answer on an empty directory, and on whatever is asked of every file system.
pub(crate) fn of_directory(request: &Request<'_>) -> Answer {
    let body = match request.operation() {
        // What is forgotten is not answered.
        2 | 42 => return (0, None),
        3 => [words(&[0; 4]), attributes(1, 0o40755, 0)].concat(),
        17 => words(&[0; 20]),
        26 => words(&[7, 31, 0, 0, 0, 4096, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        27 => words(&[0; 4]),
        28 | 29 => Vec::new(),
        _ => return (-38, Some(Vec::new())),
    };
    (0, Some(body))
}
