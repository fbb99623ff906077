//! The second disk of a lab: the plan, and the files that it names.
//!
//! It is an ext4 image that `mke2fs -d` makes of a directory of hard links, because the cloud kernel has no 9p, a
//! virtio file system would need a server beside QEMU, and a disk is what every kernel has and nothing writes back to. A program is found in the lab at the path that it has on the host, so that what it was compiled with holds there:
//! the directory of the disk that holds its file is bound to the path of its directory.
//!
//! ```text
//!  /code/target/debug/deps/a-1234  ─► DISK/0/a-1234 ─► /lab/input/0 bound to /code/target/debug/deps
//!  WRENN_FIRECRACKER=/opt/fc       ─► DISK/carried/WRENN_FIRECRACKER/fc ─► the variable names that file
//!  /usr/bin/stat                   ─► nothing: a program of the system is the lab's own
//! ```

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use wrenn_lab::plan::{self, Plan, Program};

use crate::{
    firecracker,
    root_tree::{BLOCK, RootTree, Size},
    step,
};

/// Variables that name a file which the lab gets, and a path there.
const CARRIED: [&str; 2] = firecracker::VARIABLES;
/// Variables that are the same in the lab.
const PASSED: [&str; 7] = [
    "PROPTEST_CASES",
    "RUST_BACKTRACE",
    "RUST_LOG",
    "RUST_TEST_THREADS",
    "WRENN_MEMORY_BACKEND",
    "WRENN_SOAK",
    "WRENN_UIDS",
];
/// The directory of the disk for files that variables name.
const CARRIED_DIRECTORY: &str = "carried";
/// What is below these is the lab's own.
const OF_THE_SYSTEM: [&str; 5] = ["/bin", "/lib", "/lib64", "/sbin", "/usr"];

/// What is to be on the disk.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Input {
    pub(super) plan: Plan,
    /// Files and directories of the host, and where on the disk they are.
    pub(super) files: BTreeMap<PathBuf, PathBuf>,
}

impl Input {
    /// Decides what is where. Pure.
    pub(super) fn new(
        programs: Vec<Program>,
        with: &[PathBuf],
        modules: Vec<String>,
        variables: impl Fn(&str) -> Option<OsString>,
    ) -> Result<Self> {
        let mut input = Self { plan: Plan { modules, ..Plan::default() }, ..Self::default() };
        let brought: Vec<&Path> = programs
            .iter()
            .map(|program| program.path.as_path())
            .chain(with.iter().map(PathBuf::as_path))
            // A bare name is looked for on the PATH of the lab.
            .filter(|path| path.is_absolute() && !OF_THE_SYSTEM.iter().any(|place| path.starts_with(place)))
            .collect();
        input.bind(&brought)?;
        input.plan.programs = programs;
        for name in CARRIED {
            let Some(value) = variables(name).filter(|value| !value.is_empty()) else { continue };
            let file = PathBuf::from(value);
            let program = file.file_name().with_context(|| format!("{name} names no file"))?;
            // Under its own name, by which processes are known.
            let place = Path::new(CARRIED_DIRECTORY).join(name).join(program);
            let there = Path::new(plan::INPUT).join(&place).display().to_string();
            input.files.insert(file, place);
            input.plan.environment.insert(name.to_owned(), there);
        }
        for name in PASSED {
            if let Some(value) = variables(name).and_then(|value| value.into_string().ok()) {
                input.plan.environment.insert(name.to_owned(), value);
            }
        }
        Ok(input)
    }

    /// Binds the directories of these files. One within another is part of it, as a bind hides what was there.
    fn bind(&mut self, brought: &[&Path]) -> Result<()> {
        let mut directories = BTreeSet::new();
        for path in brought {
            match path.parent() {
                Some(directory) if path.file_name().is_some() => directories.insert(directory),
                _ => bail!("{} cannot be brought into the lab", path.display()),
            };
        }
        let is_within = |directory: &Path| {
            let mut above = directory.ancestors().skip(1);
            above.any(|above| directories.contains(above))
        };
        let outermost = directories.iter().filter(|directory| !is_within(directory));
        for (number, directory) in outermost.enumerate() {
            let name = number.to_string();
            for path in brought {
                if let Ok(inside) = path.strip_prefix(directory) {
                    self.files.insert(path.to_path_buf(), Path::new(&name).join(inside));
                }
            }
            self.plan.binds.insert(name, directory.to_path_buf());
        }
        Ok(())
    }

    /// Makes the disk. Nothing but the opened file is left of it.
    pub(super) fn make_disk(&self, scratch: &Path) -> Result<File> {
        let tree = scratch.join("input");
        fs::create_dir(&tree)?;
        fs::write(tree.join(plan::FILE), serde_json::to_vec(&self.plan)?)?;
        for (from, to) in &self.files {
            let to = tree.join(to);
            if let Some(parent) = to.parent() {
                fs::create_dir_all(parent).with_context(|| format!("making {}", parent.display()))?;
            }
            // A link costs nothing, but is refused across file systems, and one to a link would lead nowhere.
            let is_file =
                fs::metadata(from).with_context(|| format!("reading {}", from.display()))?.is_file();
            let source = fs::canonicalize(from).with_context(|| format!("reading {}", from.display()))?;
            if !is_file || fs::hard_link(&source, &to).is_err() {
                step::output(
                    Command::new("cp")
                        .args(["--archive", "--dereference", "--reflink=auto", "--no-target-directory"])
                        .args([&source, &to]),
                )?;
            }
        }
        let image = scratch.join("input.ext4");
        File::create_new(&image)?.set_len(size_of_disk(RootTree::at(&tree).size()?))?;
        step::output(
            Command::new("mke2fs")
                .args(["-q", "-t", "ext4", "-b", &BLOCK.to_string(), "-m", "0", "-O", "^has_journal"])
                .args(["-E", "assume_storage_prezeroed=1,lazy_itable_init=1,nodiscard", "-d"])
                .args([&tree, &image]),
        )?;
        let file = File::open(&image).with_context(|| format!("opening {}", image.display()))?;
        for path in [&tree, &image] {
            crate::cache::remove(path)?;
        }
        Ok(file)
    }
}

/// The size of a disk for that content, in bytes.
fn size_of_disk(content: Size) -> u64 {
    // What ext4 needs for itself: a table of inodes, bitmaps, and blocks that hold addresses of blocks.
    let blocks = content.blocks + content.blocks / 32 + content.inodes + 4096;
    (blocks * BLOCK).next_multiple_of(1 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(path: &str) -> Program {
        Program { path: path.into(), arguments: Vec::new(), directory: "/".into() }
    }

    #[test]
    fn a_program_is_found_where_it_is_on_the_host() {
        let programs = vec![
            program("/code/a/one"),
            program("/code/a/two"),
            program("/code/b/one"),
            program("/usr/bin/stat"),
            program("true"),
        ];
        let input = Input::new(programs, &["/code/b/data".into()], Vec::new(), |_| None).unwrap();
        let binds: Vec<(&str, &Path)> =
            input.plan.binds.iter().map(|(name, place)| (name.as_str(), place.as_path())).collect();
        assert_eq!(binds, [("0", Path::new("/code/a")), ("1", Path::new("/code/b"))]);
        let files: Vec<(&Path, &Path)> =
            input.files.iter().map(|(from, to)| (from.as_path(), to.as_path())).collect();
        let expected = [
            ("/code/a/one", "0/one"),
            ("/code/a/two", "0/two"),
            ("/code/b/data", "1/data"),
            ("/code/b/one", "1/one"),
        ];
        assert_eq!(files, expected.map(|(from, to)| (Path::new(from), Path::new(to))));
        assert_eq!(input.plan.programs.len(), 5, "a program of the system runs, and is not brought");
    }

    #[test]
    fn a_directory_within_another_is_part_of_it() {
        let programs =
            vec![program("/code/debug/deps/test"), program("/code/debug/tool"), program("/code/d")];
        let input = Input::new(programs, &[], Vec::new(), |_| None).unwrap();
        assert_eq!(input.plan.binds, BTreeMap::from([("0".to_owned(), "/code".into())]));
        let places: Vec<&Path> = input.files.values().map(PathBuf::as_path).collect();
        assert_eq!(places, ["0/d", "0/debug/deps/test", "0/debug/tool"].map(Path::new));
    }

    #[test]
    fn variables_that_name_files_name_those_of_the_lab() {
        let input = Input::new(Vec::new(), &[], Vec::new(), |name| match name {
            "WRENN_FIRECRACKER" => Some("/opt/fc".into()),
            "WRENN_JAILER" => Some("".into()),
            "WRENN_SOAK" => Some("1".into()),
            "HOME" => Some("/home/somebody".into()),
            _ => None,
        })
        .unwrap();
        let expected = BTreeMap::from([
            ("WRENN_FIRECRACKER".to_owned(), "/lab/input/carried/WRENN_FIRECRACKER/fc".to_owned()),
            ("WRENN_SOAK".to_owned(), "1".to_owned()),
        ]);
        assert_eq!(input.plan.environment, expected);
        assert_eq!(input.files, BTreeMap::from([("/opt/fc".into(), "carried/WRENN_FIRECRACKER/fc".into())]));
    }

    #[test]
    fn the_root_itself_is_not_brought() {
        assert!(Input::new(Vec::new(), &["/".into()], Vec::new(), |_| None).is_err());
    }

    #[test]
    fn a_disk_holds_what_it_is_made_of_and_has_no_name() {
        let home = tempfile::tempdir().unwrap();
        let scratch = tempfile::tempdir().unwrap();
        let file = home.path().join("program");
        fs::write(&file, vec![7; 3 << 20]).unwrap();
        let directory = home.path().join("directory");
        fs::create_dir(&directory).unwrap();
        fs::write(directory.join("inside"), "1").unwrap();
        let input =
            Input::new(vec![program(file.to_str().unwrap())], &[directory], Vec::new(), |_| None).unwrap();
        let disk = input.make_disk(scratch.path()).unwrap();
        assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 0);
        let path = format!("/proc/{}/fd/{}", std::process::id(), std::os::fd::AsRawFd::as_raw_fd(&disk));
        let shown =
            Command::new("debugfs").args(["-R", "cat /0/directory/inside"]).arg(&path).output().unwrap();
        assert_eq!(shown.stdout, b"1");
        let shown = Command::new("debugfs").args(["-R", "cat /plan.json"]).arg(&path).output().unwrap();
        assert_eq!(serde_json::from_slice::<Plan>(&shown.stdout).unwrap(), input.plan);
    }
}
