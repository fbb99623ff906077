//! The device mapper: block devices that the kernel puts together from others by a table.
//!
//! ```text
//!  create ─► no table ─ load ─► a table aside ─ resume ─► in use ─ suspend ─► stands still ─ resume ─► in use
//!                                                            │  load a table aside, which the resume puts in place
//!                                                            ▼
//!                                          remove: refused while it is open, or put off until it is not
//! ```
//!
//! A device that is open has a user: a process, a mount, or a table of another device. The kernel counts them, and
//! nobody else has to.
//!
//! It is spoken to by its own ioctls, of which nine are needed. The library for it (`libdevmapper`, and the crates
//! over that) would have to be on every host, and libclang at every build, mostly to agree with udev about names; names
//! are made here by whoever needs them ([`crate::block_device`]). udev is told to leave these
//! devices alone: what is on them is written by guests, and no rule of the host is to read it.

use std::{
    fmt,
    fs::{File, OpenOptions},
    io,
};

use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl, opcode};

use crate::block_device::DeviceNumber;

/// Bytes of `struct dm_ioctl`, which is the beginning of everything that is said.
const HEADER: usize = 312;
/// The same, as the kernel wants to be told where the rest begins.
const DATA_START: u32 = 312;
/// Bytes of `struct dm_target_spec`, before the parameters of a target.
const TARGET: usize = 40;
/// Of the name of a device, and of a kind of target, with the terminator.
const NAME_BYTES: usize = 128;
const KIND_BYTES: usize = 16;
/// The version of the interface that is asked for: the oldest one, which every kernel takes.
const VERSION: [u32; 3] = [4, 0, 0];
/// How large an answer may be.
const LARGEST: usize = 16 << 20;

// Where the fields of `struct dm_ioctl` are.
const AT_DATA_SIZE: usize = 12;
const AT_DATA_START: usize = 16;
const AT_TARGET_COUNT: usize = 20;
const AT_OPEN_COUNT: usize = 24;
const AT_FLAGS: usize = 28;
const AT_EVENT: usize = 32;
const AT_DEVICE: usize = 40;
const AT_NAME: usize = 48;

const READ_ONLY: u32 = 1;
const SUSPEND: u32 = 1 << 1;
const ACTIVE_PRESENT: u32 = 1 << 5;
const BUFFER_FULL: u32 = 1 << 8;
const DEFERRED_REMOVE: u32 = 1 << 17;

/// In the upper half of the event's number: this is about the device itself, and the rules of subsystems, of links
/// by label and content, and all others are not for it.
const UDEV_LEAVE_ALONE: u32 = (0x02 | 0x04 | 0x08 | 0x40) << 16;

#[derive(Debug, Clone, Copy)]
enum Command {
    List = 2,
    Create = 3,
    Remove = 4,
    Suspend = 6,
    Status = 7,
    Load = 9,
    Dependencies = 11,
    Table = 12,
    TargetVersion = 17,
}

/// One piece of a table: what so many sectors of 512 bytes are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// The first sector.
    pub start: u64,
    /// How many.
    pub sectors: u64,
    /// The kind of target.
    pub kind: &'static str,
    /// What this kind wants to know.
    pub parameters: String,
}

/// As `dmsetup` shows it.
impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.start, self.sectors, self.kind)?;
        if self.parameters.is_empty() { Ok(()) } else { write!(f, " {}", self.parameters) }
    }
}

/// What may be done with a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// It is only read, and so is what it is made of.
    ReadOnly,
    /// It is read and written.
    ReadWrite,
}

/// When a device that is to be removed goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Removal {
    /// Now, or not at all.
    Now,
    /// Now, or when its last user closes it.
    WhenClosed,
}

/// A device as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status {
    /// Its number.
    pub number: DeviceNumber,
    /// How many have it open.
    pub users: u32,
    /// Whether it has a table.
    pub has_table: bool,
    /// Whether it stands still.
    pub is_suspended: bool,
}

/// The kernel's device mapper.
#[derive(Debug)]
pub struct DeviceMapper {
    control: File,
}

impl DeviceMapper {
    /// Opens it.
    ///
    /// # Errors
    /// `NotFound` where the kernel has none or a container was not given it, `PermissionDenied` for anyone but root.
    pub fn open() -> io::Result<Self> {
        let control = OpenOptions::new().read(true).write(true).open("/dev/mapper/control")?;
        Ok(Self { control })
    }

    /// The version of a kind of target, whose module is loaded if it is not.
    ///
    /// # Errors
    /// `EINVAL` where there is no such kind, `ENOTTY` from a kernel before 5.4.
    pub fn target_version(&self, kind: &str) -> io::Result<[u32; 3]> {
        let answer = self.run(Message::new(Command::TargetVersion, kind)?)?;
        let data = answer.data();
        let part = |at| number(&data, at).ok_or_else(malformed);
        // A `struct dm_target_versions`, whose first field leads to the next one.
        Ok([part(4)?, part(8)?, part(12)?])
    }

    /// Makes a device without a table. Nobody can read it yet.
    ///
    /// # Errors
    /// `EBUSY` when there is one of this name.
    pub fn create(&self, name: &str) -> io::Result<DeviceNumber> {
        let answer = self.run(Message::new(Command::Create, name)?)?;
        answer.status().map(|status| status.number)
    }

    /// Gives a device a table, which counts from the next [`Self::resume`] on. The targets are made now: a snapshot
    /// reads what is recorded of it.
    ///
    /// # Errors
    /// The device has the table that it had. The kernel's log says which target was refused, and why.
    pub fn load(&self, name: &str, table: &[Target], access: Access) -> io::Result<()> {
        let mut message = Message::new(Command::Load, name)?;
        if access == Access::ReadOnly {
            message.set_flags(READ_ONLY);
        }
        message.add_table(table)?;
        self.run(message).map(drop)
    }

    /// Puts the table in place that was loaded, if there is one, and lets the device be read and written.
    ///
    /// # Errors
    /// The device is as it was.
    pub fn resume(&self, name: &str) -> io::Result<()> {
        let mut message = Message::new(Command::Suspend, name)?;
        message.put(AT_EVENT, &UDEV_LEAVE_ALONE.to_ne_bytes());
        self.run(message).map(drop)
    }

    /// Lets a device stand still: what was written to it is where it is written to, and what is to be written waits.
    /// Idempotent.
    ///
    /// # Errors
    /// The device is as it was.
    pub fn suspend(&self, name: &str) -> io::Result<()> {
        let mut message = Message::new(Command::Suspend, name)?;
        message.set_flags(SUSPEND);
        self.run(message).map(drop)
    }

    /// A device as it is; none when there is none.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn status(&self, name: &str) -> io::Result<Option<Status>> {
        match self.run(Message::new(Command::Status, name)?) {
            Ok(answer) => answer.status().map(Some),
            Err(error) if is_none(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// What each target of a device says of itself.
    ///
    /// # Errors
    /// There is no such device, or the kernel does not say.
    pub fn reports(&self, name: &str) -> io::Result<Vec<String>> {
        self.run(Message::new(Command::Table, name)?)?.targets()
    }

    /// The devices that the table of a device names, each once.
    ///
    /// # Errors
    /// There is no such device, or the kernel does not say.
    pub fn dependencies(&self, name: &str) -> io::Result<Vec<DeviceNumber>> {
        self.run(Message::new(Command::Dependencies, name)?)?.dependencies()
    }

    /// All devices of this machine.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn list(&self) -> io::Result<Vec<(String, DeviceNumber)>> {
        self.run(Message::new(Command::List, "")?)?.names()
    }

    /// Removes a device; whether there was one.
    ///
    /// # Errors
    /// `EBUSY` when it is open and is to go now.
    pub fn remove(&self, name: &str, removal: Removal) -> io::Result<bool> {
        let mut message = Message::new(Command::Remove, name)?;
        if removal == Removal::WhenClosed {
            message.set_flags(DEFERRED_REMOVE);
        }
        message.put(AT_EVENT, &UDEV_LEAVE_ALONE.to_ne_bytes());
        match self.run(message) {
            Ok(_) => Ok(true),
            Err(error) if is_none(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Says something, with as much room for the answer as it needs.
    fn run(&self, message: Message) -> io::Result<Message> {
        let mut room = 4096;
        loop {
            let mut attempt = message.with_room(room);
            // SAFETY: every command of the device mapper reads the number of bytes that the message says of itself
            // (`data_size`), which is at most the length of the buffer, and writes no more than that many into it.
            // The buffer is owned by `attempt` and not looked at during the call; the kernel keeps no pointer.
            #[allow(unsafe_code)]
            unsafe {
                ioctl(&self.control, &mut attempt)?;
            }
            if attempt.field(AT_FLAGS) & BUFFER_FULL == 0 {
                return Ok(attempt);
            }
            room *= 4;
            if room > LARGEST {
                return Err(malformed());
            }
        }
    }
}

/// What the kernel answers where there is no device of a name.
fn is_none(error: &io::Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::NXIO.raw_os_error())
}

fn malformed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the device mapper answered what cannot be understood")
}

/// A command and its answer: `struct dm_ioctl` and what follows it, in words so that it is aligned.
#[derive(Debug)]
struct Message {
    command: Command,
    words: Vec<u64>,
}

impl Message {
    fn new(command: Command, name: &str) -> io::Result<Self> {
        // The last byte stays the terminator. A slash would be refused by the kernel, too.
        if name.len() >= NAME_BYTES || name.bytes().any(|byte| byte == 0 || byte == b'/') {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "no name of a device"));
        }
        let mut message = Self { command, words: vec![0; HEADER / 8] };
        let version: Vec<u8> = VERSION.iter().flat_map(|part| part.to_ne_bytes()).collect();
        message.put(0, &version);
        message.put(AT_NAME, name.as_bytes());
        Ok(message)
    }

    /// The same, with so many bytes more for an answer.
    fn with_room(&self, room: usize) -> Self {
        let mut words = self.words.clone();
        words.resize(words.len() + room / 8, 0);
        let mut message = Self { command: self.command, words };
        let size = u32::try_from(message.words.len() * 8).unwrap_or(u32::MAX);
        message.put(AT_DATA_SIZE, &size.to_ne_bytes());
        message.put(AT_DATA_START, &DATA_START.to_ne_bytes());
        message
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        for (offset, byte) in bytes.iter().enumerate() {
            let place = at + offset;
            let mut word = self.words[place / 8].to_ne_bytes();
            word[place % 8] = *byte;
            self.words[place / 8] = u64::from_ne_bytes(word);
        }
    }

    fn set_flags(&mut self, flags: u32) {
        self.put(AT_FLAGS, &flags.to_ne_bytes());
    }

    fn add_table(&mut self, table: &[Target]) -> io::Result<()> {
        for target in table {
            if target.kind.len() >= KIND_BYTES {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, "no kind of a target"));
            }
            let begin = self.words.len() * 8;
            // At least one byte for the terminator, and the next one is aligned.
            let bytes = (TARGET + target.parameters.len() + 1).next_multiple_of(8);
            self.words.resize((begin + bytes) / 8, 0);
            self.put(begin, &target.start.to_ne_bytes());
            self.put(begin + 8, &target.sectors.to_ne_bytes());
            self.put(begin + 20, &u32::try_from(bytes).unwrap_or(u32::MAX).to_ne_bytes());
            self.put(begin + 24, target.kind.as_bytes());
            self.put(begin + TARGET, target.parameters.as_bytes());
        }
        self.put(AT_TARGET_COUNT, &u32::try_from(table.len()).unwrap_or(u32::MAX).to_ne_bytes());
        Ok(())
    }

    fn bytes(&self) -> Vec<u8> {
        self.words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    fn field(&self, at: usize) -> u32 {
        // No field of four bytes lies across two words.
        let word = self.words[at / 8].to_ne_bytes();
        number(&word, at % 8).unwrap_or_default()
    }

    fn status(&self) -> io::Result<Status> {
        let number = long(&self.bytes(), AT_DEVICE).ok_or_else(malformed)?;
        let flags = self.field(AT_FLAGS);
        Ok(Status {
            number: DeviceNumber::from_huge(number),
            users: self.field(AT_OPEN_COUNT),
            has_table: flags & ACTIVE_PRESENT != 0,
            is_suspended: flags & SUSPEND != 0,
        })
    }

    /// What follows the header of an answer.
    fn data(&self) -> Vec<u8> {
        let start = self.field(AT_DATA_START) as usize;
        self.bytes().split_off(start.clamp(HEADER - 7, self.words.len() * 8))
    }

    fn targets(&self) -> io::Result<Vec<String>> {
        let data = self.data();
        let mut said = Vec::new();
        let mut at = 0;
        for _ in 0..self.field(AT_TARGET_COUNT) {
            said.push(text(&data, at + TARGET)?);
            // From the beginning of all of them, unlike in a table that is loaded.
            at = number(&data, at + 20).ok_or_else(malformed)? as usize;
        }
        Ok(said)
    }

    fn dependencies(&self) -> io::Result<Vec<DeviceNumber>> {
        let data = self.data();
        let count = number(&data, 0).ok_or_else(malformed)? as usize;
        let each = (0..count).map(|at| long(&data, 8 + 8 * at).map(DeviceNumber::from_huge));
        each.collect::<Option<_>>().ok_or_else(malformed)
    }

    fn names(&self) -> io::Result<Vec<(String, DeviceNumber)>> {
        let data = self.data();
        let mut names = Vec::new();
        let mut at = 0;
        loop {
            let device = long(&data, at).ok_or_else(malformed)?;
            // Where there is none, the first one is nothing.
            if device == 0 {
                return Ok(names);
            }
            names.push((text(&data, at + 12)?, DeviceNumber::from_huge(device)));
            match number(&data, at + 8).ok_or_else(malformed)? {
                0 => return Ok(names),
                next => at += next as usize,
            }
        }
    }
}

fn number(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn long(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

fn text(bytes: &[u8], at: usize) -> io::Result<String> {
    let rest = bytes.get(at..).ok_or_else(malformed)?;
    let end = rest.iter().position(|byte| *byte == 0).ok_or_else(malformed)?;
    String::from_utf8(rest[..end].to_vec()).map_err(|_| malformed())
}

// SAFETY: the pointer is to a buffer of at least `HEADER` bytes that lives as long as the borrow, and is declared as
// written to. The answer is read from the buffer itself.
#[allow(unsafe_code)]
unsafe impl Ioctl for &mut Message {
    type Output = ();

    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        opcode::read_write::<[u8; HEADER]>(0xfd, self.command as u8)
    }

    fn as_ptr(&mut self) -> *mut std::ffi::c_void {
        self.words.as_mut_ptr().cast()
    }

    unsafe fn output_from_ptr(_: IoctlOutput, _: *mut std::ffi::c_void) -> rustix::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(start: u64, sectors: u64, kind: &'static str, parameters: &str) -> Target {
        Target { start, sectors, kind, parameters: parameters.to_owned() }
    }

    #[test]
    fn the_numbers_of_commands_are_the_kernels() {
        // DM_DEV_CREATE and DM_TABLE_STATUS, as <linux/dm-ioctl.h> has them.
        for (command, opcode) in [(Command::Create, 0xc138_fd03), (Command::Table, 0xc138_fd0c)] {
            let mut message = Message::new(command, "one").unwrap();
            assert_eq!(Ioctl::opcode(&&mut message), opcode);
        }
    }

    #[test]
    fn a_message_is_laid_out_as_the_kernel_reads_it() {
        let mut message = Message::new(Command::Load, "wrenn").unwrap();
        message.set_flags(READ_ONLY);
        message.add_table(&[target(0, 8, "linear", "7:0 0"), target(8, 16, "zero", "")]).unwrap();
        let bytes = message.with_room(64).bytes();
        assert_eq!(bytes.len(), HEADER + 48 + 48 + 64);
        assert_eq!(number(&bytes, 0), Some(4));
        assert_eq!(number(&bytes, AT_DATA_SIZE).map(|size| size as usize), Some(bytes.len()));
        assert_eq!(number(&bytes, AT_DATA_START), Some(312));
        assert_eq!(number(&bytes, AT_TARGET_COUNT), Some(2));
        assert_eq!(number(&bytes, AT_FLAGS), Some(READ_ONLY));
        assert_eq!(text(&bytes, AT_NAME).unwrap(), "wrenn");
        assert_eq!((long(&bytes, 312), long(&bytes, 320)), (Some(0), Some(8)));
        // The next one is 48 bytes after this one.
        assert_eq!(number(&bytes, 312 + 20), Some(48));
        assert_eq!(text(&bytes, 312 + 24).unwrap(), "linear");
        assert_eq!(text(&bytes, 312 + 40).unwrap(), "7:0 0");
        assert_eq!((long(&bytes, 360), long(&bytes, 368)), (Some(8), Some(16)));
        assert_eq!(text(&bytes, 360 + 24).unwrap(), "zero");
        assert_eq!(text(&bytes, 360 + 40).unwrap(), "");
    }

    #[test]
    fn a_name_is_checked() {
        for bad in ["a/b", "a\0b", &"x".repeat(128)] {
            assert!(Message::new(Command::Status, bad).is_err(), "{bad:?}");
        }
        assert!(Message::new(Command::Status, &"x".repeat(127)).is_ok());
    }

    /// An answer with this after its header.
    fn answer(targets: u32, data: &[u8]) -> Message {
        let mut message = Message::new(Command::Table, "").unwrap().with_room(data.len().next_multiple_of(8));
        message.put(HEADER, data);
        message.put(AT_TARGET_COUNT, &targets.to_ne_bytes());
        message
    }

    #[test]
    fn answers_are_taken_apart() {
        let mut data = vec![0; 96];
        data[20..24].copy_from_slice(&48_u32.to_ne_bytes());
        data[40..45].copy_from_slice(b"7:0 0");
        data[48 + 20..48 + 24].copy_from_slice(&96_u32.to_ne_bytes());
        data[88..95].copy_from_slice(b"Invalid");
        assert_eq!(answer(2, &data).targets().unwrap(), ["7:0 0", "Invalid"]);
        assert!(answer(3, &data).targets().is_err());

        let dependencies =
            [&2_u32.to_ne_bytes()[..], &[0; 4], &0x700_u64.to_ne_bytes(), &0xfd01_u64.to_ne_bytes()];
        let found = answer(0, &dependencies.concat()).dependencies().unwrap();
        assert_eq!(found, [DeviceNumber { major: 7, minor: 0 }, DeviceNumber { major: 253, minor: 1 }]);
        assert!(answer(0, &u32::MAX.to_ne_bytes()).dependencies().is_err());

        let one = [&0xfd00_u64.to_ne_bytes()[..], &24_u32.to_ne_bytes(), b"first\0......"].concat();
        let two = [&0xfd01_u64.to_ne_bytes()[..], &0_u32.to_ne_bytes(), b"second\0"].concat();
        let names = answer(0, &[one, two].concat()).names().unwrap();
        let of = |minor| DeviceNumber { major: 253, minor };
        assert_eq!(names, [("first".to_owned(), of(0)), ("second".to_owned(), of(1))]);
        assert!(answer(0, &[0; 16]).names().unwrap().is_empty());
    }

    #[test]
    fn a_target_is_shown_as_dmsetup_shows_it() {
        assert_eq!(target(8, 16, "zero", "").to_string(), "8 16 zero");
        assert_eq!(target(0, 8, "linear", "7:0 0").to_string(), "0 8 linear 7:0 0");
    }
}
