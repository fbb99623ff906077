//! The devices of one instance: made, changed, removed, and collected.
//!
//! Who uses a device is the kernel's to know: a device that somebody has open stays, and of the others none is needed.
//!
//! ```text
//!  machine ──has open──► disk ──► image ──► loop device of the image     an image is told to go, and a loop device
//!                          └────► loop device of the file                clears itself, when nobody has it open
//! ```
//!
//! So there is nothing to be counted here, and nothing that an agent that is killed could forget but a disk without a
//! machine, which the next one removes.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, DirBuilder, File},
    io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    sync::{Mutex, MutexGuard, PoisonError},
    thread::sleep,
    time::{Duration, Instant},
};

use camino::{Utf8Path, Utf8PathBuf};
use rustix::fs::{MemfdFlags, memfd_create};
use wrenn_host_linux::{
    block_device::{DeviceNumber, remove_node},
    device_mapper::{Access, DeviceMapper, Removal},
    lock::FileLock,
    loop_device::{self, Backing, BackingFile, LoopDevice},
};
use wrenn_types::InstanceId;

use super::{
    description::{BLOCK, Description},
    table::{self, Identity, Kind, Names},
};
use crate::rootfs::{RootfsError, RootfsResult};

/// Where names of devices are made: `/run` may be mounted so that none can be opened there.
const NODES: &str = "/dev/wrenn";
/// Where each agent that has such disks has a lock, as devices are the machine's and not the agent's.
pub(super) const LOCKS: &str = "/run/wrenn/disks";
/// What of the kernel is needed: each kind of target, and its oldest version that has what is used of it.
const TARGETS: [(&str, [u32; 3]); 2] = [("linear", [1, 0, 0]), ("snapshot", [1, 16, 0])];
/// How long one who looks at every new device (udev does) may have it open.
const GLANCE: Duration = Duration::from_secs(2);
/// How long to wait before it is looked again whether somebody has closed a device.
const GLANCE_PAUSE: Duration = Duration::from_millis(5);
/// How often what a device stands on may go while that is made.
const ATTEMPTS: usize = 5;

#[derive(Debug)]
pub(super) struct Devices {
    mapper: DeviceMapper,
    names: Names,
    nodes: Utf8PathBuf,
    /// Held while devices are made and removed: what one disk stands on is not to go while it is used for another.
    changing: Mutex<()>,
    /// Says that there is an agent of this instance. Free, what nobody has open is collected by any other agent.
    lock: Option<FileLock>,
}

/// A device that could not be dealt with.
fn failed(operation: &'static str, device: &str) -> impl FnOnce(io::Error) -> RootfsError {
    let device = device.to_owned();
    move |source| RootfsError::Device { operation, device, source }
}

pub(super) fn identity(file: &File, path: &Utf8Path) -> RootfsResult<Identity> {
    let metadata = file.metadata().map_err(|error| RootfsError::file("examine", path, error))?;
    Ok(Identity(metadata.dev(), metadata.ino()))
}

impl Devices {
    /// Those of an instance, none of which is looked at yet.
    pub(super) fn of(instance: &InstanceId) -> RootfsResult<Self> {
        let mapper = DeviceMapper::open().map_err(failed("open", "/dev/mapper/control"))?;
        for (kind, needed) in TARGETS {
            let found =
                mapper.target_version(kind).map_err(failed("find the device mapper's target", kind))?;
            if found < needed {
                let source = io::Error::new(io::ErrorKind::Unsupported, "the kernel is older than 5.4");
                return Err(failed("use the device mapper's target", kind)(source));
            }
        }
        let nodes = Utf8Path::new(NODES).join(instance.as_str());
        for directory in [nodes.as_path(), Utf8Path::new(LOCKS)] {
            let made = DirBuilder::new().recursive(true).mode(0o700).create(directory);
            made.map_err(|error| RootfsError::file("make", directory, error))?;
        }
        let path = Utf8Path::new(LOCKS).join(instance.as_str());
        let lock = FileLock::try_acquire(path.as_std_path());
        let lock = lock.map_err(|error| RootfsError::file("lock", &path, error))?;
        let lock = Some(lock.ok_or(RootfsError::InUse { path })?);
        let names = Names::of(instance);
        Ok(Self { mapper, names, nodes, changing: Mutex::default(), lock })
    }

    /// Makes the device of a disk, whose file is open for writing. Answers with the path of the device.
    ///
    /// # Errors
    /// There is none, and [`RootfsError::InUse`] when somebody has it open.
    pub(super) fn open(
        &self,
        path: &Utf8Path,
        file: &File,
        image: &File,
        description: &Description,
    ) -> RootfsResult<Utf8PathBuf> {
        let _changing = self.changing();
        let name = self.names.disk(identity(file, path)?);
        self.remove_now(&name, path)?;
        let made = self.make_disk(&name, file, image, description);
        if made.is_err() {
            self.remove_quietly(&name);
            self.leave_image(image, description);
        }
        made
    }

    fn make_disk(
        &self,
        name: &str,
        file: &File,
        image: &File,
        description: &Description,
    ) -> RootfsResult<Utf8PathBuf> {
        let label = format!("wrenn-{} disk", self.names.instance());
        let backing = Backing { file, offset: BLOCK, is_writable: true, label: &label };
        let cow =
            LoopDevice::make(backing, self.nodes.as_std_path()).map_err(failed("make", "a loop device"))?;
        let device = self.mapper.create(name).map_err(failed("make", name))?;
        self.load_over_image(name, image, cow.number(), description)?;
        self.leave_image(image, description);
        self.mapper.resume(name).map_err(failed("start", name))?;
        let node = self.node(name);
        device
            .make_node(node.as_std_path())
            .map_err(|error| RootfsError::file("make the device", &node, error))?;
        Ok(node)
    }

    /// Loads the table of a disk over the device of its image, which is made if it is not there. The table names what is below
    /// by its number, and one that was to go when nobody has it open may go in any moment, and its number be somebody else's: so it
    /// is held open until the table does that.
    fn load_over_image(
        &self,
        name: &str,
        image: &File,
        cow: DeviceNumber,
        description: &Description,
    ) -> RootfsResult<()> {
        let mut attempts = 1..=ATTEMPTS;
        loop {
            let below = self.image(image, description)?;
            let held = below.open(self.nodes.as_std_path(), false);
            // It had that number before it was opened, and has it still.
            let is_held = held.is_ok() && self.image_number(image, description)? == Some(below);
            if is_held {
                let table = table::disk(below, cow, description);
                let loaded = self.mapper.load(name, &table, Access::ReadWrite);
                return loaded.map_err(failed("load the table of", name));
            }
            if attempts.next().is_none() {
                let gone = || io::Error::other("it goes again and again");
                return Err(failed("open the image of", name)(held.err().unwrap_or_else(gone)));
            }
        }
    }

    /// Removes the device of a disk, if it has one: now, or when its user closes it.
    ///
    /// # Errors
    /// It is still there.
    pub(super) fn close(&self, file: Identity) -> RootfsResult<()> {
        let _changing = self.changing();
        let name = self.names.disk(file);
        // First, so that nobody finds another device under a number that is free again.
        self.remove_node(&name)?;
        self.mapper.remove(&name, Removal::WhenClosed).map(drop).map_err(failed("remove", &name))
    }

    /// The same, but the device is gone then.
    ///
    /// # Errors
    /// [`RootfsError::InUse`] when somebody has it open for longer than a glance.
    pub(super) fn close_now(&self, file: Identity, path: &Utf8Path) -> RootfsResult<()> {
        let _changing = self.changing();
        self.remove_now(&self.names.disk(file), path)
    }

    #[expect(clippy::disallowed_methods, reason = "the kernel tells nobody that a device was closed")]
    fn remove_now(&self, name: &str, path: &Utf8Path) -> RootfsResult<()> {
        let begin = Instant::now();
        loop {
            match self.mapper.remove(name, Removal::Now) {
                Ok(_) => return self.remove_node(name),
                Err(error) if error.kind() != io::ErrorKind::ResourceBusy => {
                    return Err(failed("remove", name)(error));
                }
                Err(_) if begin.elapsed() > GLANCE => {
                    return Err(RootfsError::InUse { path: path.to_owned() });
                }
                Err(_) => sleep(GLANCE_PAUSE),
            }
        }
    }

    /// Whether the disk has a device.
    pub(super) fn is_open(&self, file: Identity) -> RootfsResult<bool> {
        let name = self.names.disk(file);
        Ok(self.mapper.status(&name).map_err(failed("examine", &name))?.is_some())
    }

    /// Waits until what was written to the device of a disk, if it has one, is in its file.
    ///
    /// # Errors
    /// [`RootfsError::GivenUp`] where something could not be written, now or earlier.
    pub(super) fn settle(&self, file: Identity, path: &Utf8Path) -> RootfsResult<()> {
        let name = self.names.disk(file);
        let Some(status) = self.mapper.status(&name).map_err(failed("examine", &name))? else {
            return Ok(());
        };
        // What a process has written is in the memory of the device until somebody says this.
        let device = status.number.open(self.nodes.as_std_path(), false);
        let written = device.map_err(failed("open", &name))?.sync_all();
        self.refuse_given_up(&name, path)?;
        written.map_err(failed("write to disk", &name))
    }

    /// Does something while the device of a disk, if it has one, stands still and all that was written to it is in its
    /// file.
    ///
    /// # Errors
    /// As [`Self::settle`], and those of the work.
    pub(super) fn while_still<T>(
        &self,
        file: Identity,
        path: &Utf8Path,
        work: impl FnOnce() -> RootfsResult<T>,
    ) -> RootfsResult<T> {
        self.settle(file, path)?;
        let name = self.names.disk(file);
        if self.mapper.status(&name).map_err(failed("examine", &name))?.is_none() {
            return work();
        }
        let _still = Still::new(self, &name)?;
        self.refuse_given_up(&name, path)?;
        work()
    }

    fn refuse_given_up(&self, name: &str, path: &Utf8Path) -> RootfsResult<()> {
        let reports = self.mapper.reports(name).map_err(failed("examine", name))?;
        match reports.iter().any(|report| report == "Invalid" || report == "Overflow") {
            true => Err(RootfsError::GivenUp { path: path.to_owned() }),
            false => Ok(()),
        }
    }

    /// Gives the device of a disk, if it has one, the size that is described; its file is as long as that needs.
    ///
    /// # Errors
    /// It has the size that it had.
    pub(super) fn grow(&self, file: Identity, image: &File, description: &Description) -> RootfsResult<()> {
        let _changing = self.changing();
        let name = self.names.disk(file);
        if self.mapper.status(&name).map_err(failed("examine", &name))?.is_none() {
            return Ok(());
        }
        let present = self.mapper.dependencies(&name).map_err(failed("examine", &name))?;
        let cow = present.into_iter().find(|number| number.major == loop_device::MAJOR);
        let opened = cow.map(|number| LoopDevice::find(number, self.nodes.as_std_path(), true)).transpose();
        let Some((cow, _)) = opened.map_err(failed("open the loop device of", &name))?.flatten() else {
            let source = io::Error::other("it stands on no loop device");
            return Err(failed("examine", &name)(source));
        };
        cow.take_size().map_err(failed("grow the loop device of", &name))?;
        // Made before, if it is not there: nobody has to stand still for that.
        self.image(image, description)?;
        let grown = {
            // The kernel reads what is recorded when a table is loaded: nothing is to be recorded after that.
            let _still = Still::new(self, &name)?;
            self.load_over_image(&name, image, cow.number(), description)
        };
        self.leave_image(image, description);
        grown
    }

    /// Lets the device of an image go with the last disk that differs from it, now that there is one; without any it
    /// goes at once. Until then others may use it, too.
    fn leave_image(&self, image: &File, description: &Description) {
        let left = identity(image, &description.image).and_then(|file| {
            let name = self.names.image(file, description.disk_sectors());
            self.mapper.remove(&name, Removal::WhenClosed).map_err(failed("let go", &name))
        });
        if let Err(error) = left {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "the device of an image stays until the next start"
            );
        }
    }

    /// The device that disks of this image and this size differ from, made if there is none.
    fn image(&self, image: &File, description: &Description) -> RootfsResult<DeviceNumber> {
        let file = identity(image, &description.image)?;
        let name = self.names.image(file, description.disk_sectors());
        match self.mapper.status(&name).map_err(failed("examine", &name))? {
            Some(status) if status.has_table => return Ok(status.number),
            // Whoever made it was killed before it had one.
            Some(_) => self.mapper.remove(&name, Removal::Now).map(drop).map_err(failed("remove", &name))?,
            None => {}
        }
        let device = self.loop_device(image, file)?;
        let zeros = self.zeros(description)?;
        let number = self.mapper.create(&name).map_err(failed("make", &name))?;
        let table = table::image(device.number(), zeros.as_ref().map(LoopDevice::number), description);
        let made = self
            .mapper
            .load(&name, &table, Access::ReadOnly)
            .map_err(failed("load the table of", &name))
            .and_then(|()| self.mapper.resume(&name).map_err(failed("start", &name)));
        match made {
            Ok(()) => Ok(number),
            Err(error) => {
                self.remove_quietly(&name);
                Err(error)
            }
        }
    }

    /// The number of that device, if there is one.
    fn image_number(&self, image: &File, description: &Description) -> RootfsResult<Option<DeviceNumber>> {
        let name = self.names.image(identity(image, &description.image)?, description.disk_sectors());
        let status = self.mapper.status(&name).map_err(failed("examine", &name))?;
        Ok(status.map(|status| status.number))
    }

    /// The loop device of an image: the one that disks of another size have, or a new one.
    fn loop_device(&self, image: &File, file: Identity) -> RootfsResult<LoopDevice> {
        let nodes = self.nodes.as_std_path();
        let of_others = self.names.images(file);
        for (name, _) in self.list()? {
            if !name.starts_with(&of_others) {
                continue;
            }
            // One that goes meanwhile has none.
            let Ok(below) = self.mapper.dependencies(&name) else { continue };
            for number in below.into_iter().filter(|number| number.major == loop_device::MAJOR) {
                let found =
                    LoopDevice::find(number, nodes, false).map_err(failed("open", "a loop device"))?;
                let wanted = BackingFile { identity: (file.0, file.1), offset: 0, is_read_only: true };
                if let Some((device, backing)) = found
                    && backing == wanted
                {
                    return Ok(device);
                }
            }
        }
        let label = format!("wrenn-{} image", self.names.instance());
        let backing = Backing { file: image, offset: 0, is_writable: false, label: &label };
        LoopDevice::make(backing, nodes).map_err(failed("make", "a loop device"))
    }

    /// A loop device of the zeros behind an image, if there are any.
    fn zeros(&self, description: &Description) -> RootfsResult<Option<LoopDevice>> {
        let bytes = description.disk_bytes - description.image_bytes;
        if bytes == 0 {
            return Ok(None);
        }
        let label = format!("wrenn-{} zeros", self.names.instance());
        let make = || {
            // It takes no memory, as nobody writes to it, and goes with its device.
            let file = File::from(memfd_create(label.as_str(), MemfdFlags::CLOEXEC)?);
            file.set_len(bytes)?;
            let backing = Backing { file: &file, offset: 0, is_writable: false, label: &label };
            LoopDevice::make(backing, self.nodes.as_std_path())
        };
        make().map(Some).map_err(failed("make", "a loop device of zeros"))
    }

    fn list(&self) -> RootfsResult<Vec<(String, DeviceNumber)>> {
        self.mapper.list().map_err(failed("list", "the devices of the device mapper"))
    }

    fn remove_quietly(&self, name: &str) {
        if let Err(error) = self.mapper.remove(name, Removal::Now) {
            tracing::warn!(name, %error, "a device stays until the next start");
        }
    }

    /// Removes every device of this instance, and of instances without an agent, that nobody has open; answers how many
    /// disks there were. What stands still since its agent was killed goes on.
    ///
    /// # Errors
    /// One of this instance could not be removed, or nothing can be listed.
    pub(super) fn collect(&self) -> RootfsResult<usize> {
        let _changing = self.changing();
        let mut of_each: BTreeMap<InstanceId, Vec<(String, Kind)>> = BTreeMap::new();
        for (name, _) in self.list()? {
            if let Some((instance, kind)) = table::owner(&name) {
                of_each.entry(instance).or_default().push((name, kind));
            }
        }
        let ours = self.names.instance();
        let mut removed = self.collect_of(ours, of_each.remove(ours).unwrap_or_default())?;
        for (instance, devices) in of_each {
            match self.collect_of_other(&instance, devices) {
                Ok(disks) => removed += disks,
                Err(error) => {
                    let error = &error as &dyn std::error::Error;
                    tracing::warn!(%instance, error, "what another instance left stays for now");
                }
            }
        }
        Ok(removed)
    }

    fn collect_of_other(&self, instance: &InstanceId, devices: Vec<(String, Kind)>) -> RootfsResult<usize> {
        let path = Utf8Path::new(LOCKS).join(instance.as_str());
        // Held, so that its agent does not start meanwhile.
        let lock = FileLock::try_acquire(path.as_std_path());
        let Some(lock) = lock.map_err(|error| RootfsError::file("lock", &path, error))? else { return Ok(0) };
        let removed = self.collect_of(instance, devices)?;
        // What is in it is used by those devices that are left.
        if fs::remove_dir(Utf8Path::new(NODES).join(instance.as_str())).is_ok() {
            lock.remove().map_err(|error| RootfsError::file("remove", &path, error))?;
        }
        Ok(removed)
    }

    fn collect_of(&self, instance: &InstanceId, mut devices: Vec<(String, Kind)>) -> RootfsResult<usize> {
        // A disk has the device of its image open.
        devices.sort_by_key(|(_, kind)| *kind == Kind::Image);
        let nodes = Utf8Path::new(NODES).join(instance.as_str());
        let mut removed = 0;
        let mut left = BTreeSet::new();
        for (name, kind) in devices {
            let status = self.mapper.status(&name).map_err(failed("examine", &name))?;
            let Some(status) = status else { continue };
            if status.users == 0 {
                self.mapper.remove(&name, Removal::WhenClosed).map_err(failed("remove", &name))?;
                removed += usize::from(kind == Kind::Disk);
                continue;
            }
            if status.is_suspended && kind == Kind::Disk {
                self.mapper.resume(&name).map_err(failed("start", &name))?;
            }
            left.insert(name);
        }
        let names = match nodes.read_dir_utf8() {
            Ok(names) => names,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(removed),
            Err(error) => return Err(RootfsError::file("list", &nodes, error)),
        };
        for name in names {
            let name = name.map_err(|error| RootfsError::file("list", &nodes, error))?;
            if !left.contains(name.file_name()) {
                let gone = remove_node(name.path().as_std_path());
                gone.map_err(|error| RootfsError::file("remove", name.path(), error))?;
            }
        }
        Ok(removed)
    }

    fn node(&self, name: &str) -> Utf8PathBuf {
        self.nodes.join(name)
    }

    fn remove_node(&self, name: &str) -> RootfsResult<()> {
        let node = self.node(name);
        remove_node(node.as_std_path()).map_err(|error| RootfsError::file("remove", &node, error))
    }

    fn changing(&self) -> MutexGuard<'_, ()> {
        // It guards no data: what a panic left is found by name.
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Devices {
    /// Leaves the devices of machines that go on, and their names; without any, nothing is left.
    fn drop(&mut self) {
        if fs::remove_dir(&self.nodes).is_ok()
            && let Some(Err(error)) = self.lock.take().map(FileLock::remove)
        {
            tracing::warn!(%error, "the lock of the disks stays");
        }
    }
}

/// A device that stands still until this is dropped.
struct Still<'a> {
    devices: &'a Devices,
    name: &'a str,
}

impl<'a> Still<'a> {
    fn new(devices: &'a Devices, name: &'a str) -> RootfsResult<Self> {
        devices.mapper.suspend(name).map_err(failed("hold", name))?;
        Ok(Self { devices, name })
    }
}

impl Drop for Still<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.devices.mapper.resume(self.name) {
            tracing::error!(name = self.name, %error, "a disk stands still until the next start");
        }
    }
}
