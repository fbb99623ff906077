//! The driver on a kernel: what it shares, what it leaves, and what becomes of a disk when all goes wrong.

use std::{
    fs::{self, OpenOptions},
    io::{Read as _, Write as _},
    os::unix::fs::FileExt,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use camino::Utf8PathBuf;
use wrenn_host_linux::device_mapper::DeviceMapper;

use super::{records::tests::write_as_the_kernel, *};
use crate::rootfs::{
    conformance::{self, assert_pattern, image, size, write},
    own_filesystem::{self, Kind},
};

const MIB: u64 = 1 << 20;

/// One instance on a machine whose kernel has a device mapper.
struct World {
    instance: InstanceId,
    store: DmSnapshotStore,
    at: Utf8PathBuf,
    _guard: tempfile::TempDir,
}

/// Why there is no device mapper here. In the lab there is one.
fn missing() -> Option<String> {
    let error = DeviceMapper::open().err()?;
    assert!(std::env::var_os("WRENN_LAB").is_none(), "the lab has a device mapper: {error}");
    Some(format!("no device mapper ({error})"))
}

#[expect(clippy::print_stdout, reason = "this is how a test says so")]
fn world() -> Option<World> {
    if let Some(why) = missing() {
        println!("skipped: dm-snapshot: {why}");
        return None;
    }
    let (guard, at) = conformance::directory();
    let instance = InstanceId::random();
    let store = DmSnapshotStore::new(&instance).unwrap();
    Some(World { instance, store, at, _guard: guard })
}

impl World {
    /// The agent is gone, and another one of the same instance is there.
    fn again(self) -> Self {
        drop(self.store);
        let store = DmSnapshotStore::new(&self.instance).unwrap();
        Self { store, ..self }
    }

    fn clone(&self, base: &DiskSpec, name: &str) -> DiskSpec {
        self.store.clone_disk(base, &self.at.join(name), size(1024)).unwrap()
    }

    /// Nothing of this instance is left on the machine, in a moment: what goes with its last user is seen to go.
    fn leaves_nothing(self) {
        let Self { instance, store, at, .. } = self;
        drop(store);
        let begin = Instant::now();
        loop {
            let left = left_of(&instance, &at);
            if left.is_empty() {
                return;
            }
            assert!(begin.elapsed() < Duration::from_secs(20), "{left:?} are left");
            std::thread::yield_now();
        }
    }
}

/// What there is of an instance: devices, loop devices over files of a directory, names of devices, the lock.
fn left_of(instance: &InstanceId, at: &Utf8Path) -> Vec<String> {
    let mark = format!("wrenn-{instance}-");
    let mut left: Vec<String> =
        DeviceMapper::open().unwrap().list().unwrap().into_iter().map(|it| it.0).collect();
    left.retain(|name| name.starts_with(&mark));
    left.extend(loops_over(at));
    left.extend(loops_over(Utf8Path::new(&format!("/memfd:wrenn-{instance}"))));
    let nodes = format!("/dev/wrenn/{instance}");
    left.extend(Path::new(&nodes).exists().then_some(nodes));
    let lock = Utf8Path::new(devices::LOCKS).join(instance.as_str());
    left.extend(lock.exists().then(|| lock.into_string()));
    left
}

/// The files below a directory that loop devices are made of, one for each device.
fn loops_over(at: &Utf8Path) -> Vec<String> {
    let mut files = Vec::new();
    for entry in fs::read_dir("/sys/block").unwrap() {
        let backing = entry.unwrap().path().join("loop/backing_file");
        // Most block devices are no loop devices, and some go meanwhile.
        if let Ok(file) = fs::read_to_string(backing)
            && file.starts_with(at.as_str())
        {
            files.push(file.trim_end().to_owned());
        }
    }
    files
}

/// A process that has a device open, as a machine does.
struct Machine(Child);

impl Machine {
    fn with(device: &DiskSpec) -> Self {
        let file = OpenOptions::new().read(true).write(true).open(&device.path).unwrap();
        let mut command = Command::new("sh");
        let command = command.args(["-c", "echo >&2; read line"]).stdin(Stdio::piped()).stdout(file);
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        child.stderr.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        Self(child)
    }

    fn end(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[test]
fn conforms() {
    let Some(world) = world() else { return };
    conformance::run(&world.store);
    let made = own_filesystem::with(Kind::Xfs { reflink: true }, 512 * MIB, |at| {
        conformance::run_in(&world.store, at);
    });
    made.or_say_skipped("dm-snapshots on XFS");
    world.leaves_nothing();
}

#[test]
fn twenty_disks_of_an_image_share_one_loop_device_and_leave_nothing() {
    let Some(world) = world() else { return };
    let base = image(&world.at);
    let disks: Vec<_> = (0..20).map(|number| world.clone(&base, &format!("disk-{number}"))).collect();
    let larger = world.store.clone_disk(&base, &world.at.join("larger"), size(2048)).unwrap();
    let mut machines = Vec::new();
    for (number, disk) in (0..).zip(&disks) {
        let device = world.store.open(disk).unwrap();
        let file = OpenOptions::new().write(true).open(&device.path).unwrap();
        file.write_all_at(&[number; 4096], 4096 * u64::from(number)).unwrap();
        machines.push(Machine::with(&device));
    }
    world.store.open(&larger).unwrap();
    let files = loops_over(&world.at);
    assert_eq!(files.iter().filter(|file| **file == base.path).count(), 1, "{files:?}");
    assert_eq!(files.len(), 22, "{files:?}");
    // Half of them go in any order, by being closed or by being removed; the others are as they were.
    for (number, machine) in (0_usize..).zip(machines) {
        machine.end();
        if number % 2 == 0 {
            world.store.close(&disks[number].path).unwrap();
            world.store.close(&disks[number].path).unwrap();
            assert!(!world.store.is_open(&disks[number].path).unwrap());
        } else {
            assert!(world.store.is_open(&disks[number].path).unwrap());
            world.store.remove(&disks[number].path).unwrap();
        }
    }
    assert_eq!(loops_over(&world.at).len(), 2);
    for number in (0_u8..20).step_by(2) {
        assert_pattern(&world.store, &disks[usize::from(number)], 4096 * u64::from(number), 4096, number);
    }
    world.store.remove(&larger.path).unwrap();
    world.leaves_nothing();
}

#[test]
fn a_disk_that_has_a_machine_is_not_given_to_another_nor_removed() {
    let Some(world) = world() else { return };
    let disk = world.clone(&image(&world.at), "disk");
    let device = world.store.open(&disk).unwrap();
    let machine = Machine::with(&device);
    assert!(matches!(world.store.open(&disk), Err(RootfsError::InUse { .. })));
    assert!(matches!(world.store.remove(&disk.path), Err(RootfsError::InUse { .. })));
    assert!(matches!(
        world.store.flatten(&disk, &[], &world.at.join("flat")),
        Err(RootfsError::InUse { .. })
    ));
    assert!(disk.path.exists() && !world.at.join("flat").exists());
    // Told to close it while there is one, the kernel does it when there is none.
    world.store.close(&disk.path).unwrap();
    assert!(world.store.is_open(&disk.path).unwrap());
    machine.end();
    world.leaves_nothing();
}

#[test]
fn content_outlives_machines_and_agents() {
    let Some(world) = world() else { return };
    let base = image(&world.at);
    let disk = world.clone(&base, "disk");
    write(&world.store, &disk, 8192, MIB, 5);
    let world = world.again();
    assert_pattern(&world.store, &disk, 0, 8192, 1);
    assert_pattern(&world.store, &disk, 8192, MIB, 5);
    write(&world.store, &disk, 0, 4096, 6);
    // What is saved stands on the image, wherever its own file is moved to.
    fs::create_dir(world.at.join("elsewhere")).unwrap();
    let layer = world.store.freeze(&disk, &world.at.join("elsewhere/layer")).unwrap();
    let world = world.again();
    let clone = world.clone(&layer, "clone");
    assert_pattern(&world.store, &clone, 0, 4096, 6);
    assert_pattern(&world.store, &clone, 4096, 4096, 1);
    assert_pattern(&world.store, &clone, 8192, MIB, 5);
    // Another image under its name is not taken for it.
    fs::remove_file(&base.path).unwrap();
    fs::write(&base.path, vec![7; 4096]).unwrap();
    assert!(matches!(world.store.open(&clone), Err(RootfsError::Base { .. })));
    world.leaves_nothing();
}

#[test]
fn a_clone_of_an_open_disk_has_all_that_was_written() {
    let Some(world) = world() else { return };
    let disk = world.clone(&image(&world.at), "disk");
    let device = world.store.open(&disk).unwrap();
    let machine = OpenOptions::new().read(true).write(true).open(&device.path).unwrap();
    // In the memory of the device, and nowhere else.
    machine.write_all_at(&[4; 65536], 50 * MIB).unwrap();
    let clone = world.clone(&disk, "clone");
    assert_pattern(&world.store, &clone, 50 * MIB, 65536, 4);
    // The machine goes on.
    machine.write_all_at(&[5; 65536], 50 * MIB).unwrap();
    world.store.settle(&disk).unwrap();
    let content = fs::read(&disk.path).unwrap();
    assert!(content.chunks(4096).any(|chunk| chunk == [5; 4096]));
    drop(machine);
    world.store.close(&disk.path).unwrap();
    assert_pattern(&world.store, &clone, 50 * MIB, 65536, 4);
    assert_pattern(&world.store, &disk, 50 * MIB, 65536, 5);
    world.leaves_nothing();
}

#[test]
fn a_disk_grows_under_its_machine() {
    let Some(world) = world() else { return };
    let disk = world.clone(&image(&world.at), "disk");
    let device = world.store.open(&disk).unwrap();
    let machine = OpenOptions::new().read(true).write(true).open(&device.path).unwrap();
    machine.write_all_at(&[4; 4096], 1000 * MIB).unwrap();
    assert!(machine.write_all_at(&[4; 4096], 1024 * MIB).is_err());
    world.store.grow(&disk, size(4096)).unwrap();
    world.store.grow(&disk, size(4096)).unwrap();
    machine.write_all_at(&[5; 4096], 4096 * MIB - 4096).unwrap();
    let mut read = [0; 4096];
    machine.read_exact_at(&mut read, 1000 * MIB).unwrap();
    assert_eq!(read, [4; 4096]);
    assert!(matches!(world.store.grow(&disk, size(2048)), Err(RootfsError::TooSmall { .. })));
    drop(machine);
    world.store.close(&disk.path).unwrap();
    for (offset, byte) in [(0, 1), (1000 * MIB, 4), (2048 * MIB, 0), (4096 * MIB - 4096, 5)] {
        assert_pattern(&world.store, &disk, offset, 4096, byte);
    }
    // One that is closed grows too.
    world.store.grow(&disk, size(8192)).unwrap();
    write(&world.store, &disk, 8192 * MIB - 4096, 4096, 6);
    world.leaves_nothing();
}

#[test]
fn a_full_host_gives_up_a_disk_and_nothing_that_was_saved() {
    let Some(world) = world() else { return };
    let made = own_filesystem::with(Kind::Xfs { reflink: true }, 320 * MIB, |at| {
        let base = image(at);
        let disk = world.store.clone_disk(&base, &at.join("disk"), size(1024)).unwrap();
        write(&world.store, &disk, 0, 4096, 5);
        let saved = world.store.clone_disk(&disk, &at.join("saved"), size(1024)).unwrap();
        let device = world.store.open(&disk).unwrap();
        let machine = OpenOptions::new().read(true).write(true).open(&device.path).unwrap();
        // More than there is.
        let written = (0..400).try_for_each(|number| {
            machine.write_all_at(&[6; 1 << 20], number * MIB)?;
            machine.sync_all()
        });
        assert!(written.is_err());
        // It is said, and no copy of it is taken for one.
        assert!(matches!(world.store.settle(&disk), Err(RootfsError::GivenUp { .. })));
        let error = world.store.clone_disk(&disk, &at.join("clone"), size(1024)).unwrap_err();
        assert!(matches!(error, RootfsError::GivenUp { .. }), "{error:?}");
        assert!(error.to_string().contains("lack of space"), "{error}");
        assert!(!at.join("clone").exists());
        drop(machine);
        world.store.close(&disk.path).unwrap();
        // With room again, what was saved is as it was.
        world.store.remove(&disk.path).unwrap();
        assert_pattern(&world.store, &saved, 0, 4096, 5);
        assert_pattern(&world.store, &saved, 4096, 4096, 1);
        write(&world.store, &saved, 10 * MIB, 20 * MIB, 7);
        assert_pattern(&world.store, &saved, 10 * MIB, 20 * MIB, 7);
        world.store.remove(&saved.path).unwrap();
    });
    made.or_say_skipped("a full host");
    world.leaves_nothing();
}

#[test]
fn a_disk_that_the_kernel_has_given_up_is_no_base() {
    let Some(world) = world() else { return };
    let disk = world.clone(&image(&world.at), "disk");
    write(&world.store, &disk, 0, 4096, 5);
    // As the kernel notes it, where it can.
    File::options().write(true).open(&disk.path).unwrap().write_all_at(&[0; 4], BLOCK + 4).unwrap();
    for error in [
        world.store.open(&disk).unwrap_err(),
        world.store.clone_disk(&disk, &world.at.join("clone"), size(1024)).unwrap_err(),
        world.store.freeze(&disk, &world.at.join("layer")).unwrap_err(),
        world.store.flatten(&disk, &[], &world.at.join("flat")).unwrap_err(),
    ] {
        assert!(matches!(error, RootfsError::GivenUp { .. }), "{error:?}");
    }
    assert!(disk.path.exists());
    for name in ["clone", "layer", "flat"] {
        assert!(!world.at.join(name).exists(), "{name}");
    }
    world.leaves_nothing();
}

/// Where a child of a test finds what it is to open.
const CHILD: &str = "WRENN_TEST_DISKS_OF";

/// Not a test of its own: what is killed by the one below.
#[test]
fn an_agent_that_is_killed() {
    let Ok(at) = std::env::var(CHILD) else { return };
    let at = Utf8PathBuf::from(at);
    let instance = fs::read_to_string(at.join("instance")).unwrap().parse().unwrap();
    let store = DmSnapshotStore::new(&instance).unwrap();
    let mut opened = Vec::new();
    for name in ["with a machine", "without one"] {
        let disk = DiskSpec { path: at.join(name), format: DiskFormat::DmSnapshot };
        opened.push(store.open(&disk).unwrap().path.into_string());
    }
    // In the middle of a clone of the first one.
    let mapper = DeviceMapper::open().unwrap();
    mapper.suspend(opened[0].rsplit('/').next().unwrap()).unwrap();
    // In the middle of the opening of a third.
    mapper.create(&format!("wrenn-{instance}-disk-1-1")).unwrap();
    mapper.create(&format!("wrenn-{instance}-image-1-1-1")).unwrap();
    std::io::stderr().write_all(format!("{}\n", opened[0]).as_bytes()).unwrap();
    let _ = std::io::stdin().read(&mut [0]);
}

#[test]
fn what_a_killed_agent_left_is_collected_but_what_machines_have() {
    let Some(world) = world() else { return };
    let base = image(&world.at);
    let disks = ["with a machine", "without one"].map(|name| world.clone(&base, name));
    let World { instance, store, at, _guard } = world;
    drop(store);
    fs::write(at.join("instance"), instance.as_str()).unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "rootfs::dm_snapshot::tests::an_agent_that_is_killed", "--nocapture"]);
    let command = command.env(CHILD, &at).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut agent = command.spawn().unwrap();
    let mut device = String::new();
    let mut said = std::io::BufReader::new(agent.stderr.take().unwrap());
    std::io::BufRead::read_line(&mut said, &mut device).unwrap();
    let device = DiskSpec { path: device.trim_end().into(), format: DiskFormat::Raw };
    assert!(device.path.exists(), "{device:?}");
    // While it lives, nobody else takes its disks.
    assert!(matches!(DmSnapshotStore::new(&instance), Err(RootfsError::InUse { .. })));
    let other = DmSnapshotStore::new(&InstanceId::random()).unwrap();
    other.collect().unwrap();
    let before = left_of(&instance, &at).len();
    let machine = Machine::with(&device);
    agent.kill().unwrap();
    agent.wait().unwrap();
    assert_eq!(left_of(&instance, &at).len(), before);

    let store = DmSnapshotStore::new(&instance).unwrap();
    // The one without a machine, and the one that was half made.
    assert_eq!(store.collect().unwrap(), 2);
    assert_eq!(store.collect().unwrap(), 0);
    assert!(store.is_open(&disks[0].path).unwrap() && !store.is_open(&disks[1].path).unwrap());
    // It stands still no more.
    let file = OpenOptions::new().write(true).open(&device.path).unwrap();
    file.write_all_at(&[8; 4096], 0).unwrap();
    file.sync_all().unwrap();
    drop(file);
    assert_pattern(&store, &disks[1], 0, 4096, 1);
    // That agent is gone too, and so is the machine: any other one clears up.
    drop(store);
    machine.end();
    assert_eq!(other.collect().unwrap(), 1);
    drop(other);
    let store = DmSnapshotStore::new(&instance).unwrap();
    assert_pattern(&store, &disks[0], 0, 4096, 8);
    World { instance, store, at, _guard }.leaves_nothing();
}

/// What needs no kernel: the content of a closed disk, put on top of its image.
#[test]
fn what_was_written_lies_on_top_of_the_image() {
    let (_guard, at) = conformance::directory();
    let base = image(&at);
    let description = Description::new(base.path.clone(), 600 * MIB, 600 * MIB + 512, 8).unwrap();
    let path = at.join("disk");
    let file = File::create_new(&path).unwrap();
    describe(&file, &description, &path).unwrap();
    // The second of two chunks of the image, one of zeros, and the last, of which only a sector is on the disk.
    write_as_the_kernel(&file, &description, &[(153_600, 9), (1, 4), (153_599, 0)]);
    let opened = Opened::of(&path, false).unwrap();
    let written = records::read(&opened.file, &opened.description).unwrap();
    let target = Unfinished::create(&at.join("flat")).unwrap();
    copy::copy_content(&opened.image().unwrap(), target.file()).unwrap();
    target.file().set_len(description.disk_bytes).unwrap();
    put_on_top(&opened, &written, target.file()).unwrap();
    assert_eq!(target.file().metadata().unwrap().len(), 600 * MIB + 512);
    target.keep();
    let flat = DiskSpec { path: at.join("flat"), format: DiskFormat::Raw };
    for (offset, length, byte) in
        [(0, 4096, 1), (4096, 4096, 4), (8192, MIB, 0), (600 * MIB - 4096, 4096, 0), (600 * MIB, 512, 9)]
    {
        assert_pattern(&crate::rootfs::FileStore, &flat, offset, length, byte);
    }
    assert!(crate::rootfs::FileStore.used_bytes(&flat.path).unwrap() < MIB);
}
