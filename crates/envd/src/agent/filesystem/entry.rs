//! What a client is told of a file.

use std::{
    fs::{self, FileType, Metadata},
    io,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Component, Path, PathBuf},
};

use buffa_types::google::protobuf::Timestamp;
use wrenn_proto::filesystem::{EntryInfo, FileType as WireType};

use crate::agent::{metadata, paths, users::Accounts};

const SET_UID: u32 = 0o4000;
const SET_GID: u32 = 0o2000;
const STICKY: u32 = 0o1000;

/// Describes `path` itself. A symbolic link has the type and the mode of what it leads to, and says where that is; where
/// it leads nowhere it has no type and no mode. A name that is no text is told with marks in place of what is none.
pub(super) fn describe(path: &Path, accounts: &Accounts) -> io::Result<EntryInfo> {
    let metadata = fs::symlink_metadata(path)?;
    let (kind, mode, target) = if metadata.is_symlink() {
        let (kind, mode) = fs::metadata(path).map_or((WireType::FILE_TYPE_UNSPECIFIED, 0), |target| {
            (wire_type(target.file_type()), target.mode())
        });
        (kind, mode, Some(target(path)))
    } else {
        (wire_type(metadata.file_type()), metadata.mode(), None)
    };
    let text = path.to_string_lossy();
    Ok(EntryInfo {
        name: paths::name(&text).to_owned(),
        r#type: kind.into(),
        size: i64::try_from(metadata.len()).unwrap_or(i64::MAX),
        mode: mode & 0o777,
        permissions: permissions(&metadata),
        owner: accounts.user_name(metadata.uid()),
        group: accounts.group_name(metadata.gid()),
        modified_time: modified(&metadata).into(),
        symlink_target: target,
        metadata: metadata::read(path).into_iter().collect(),
        path: text.into_owned(),
        ..EntryInfo::default()
    })
}

fn wire_type(kind: FileType) -> WireType {
    if kind.is_file() {
        WireType::FILE_TYPE_FILE
    } else if kind.is_dir() {
        WireType::FILE_TYPE_DIRECTORY
    } else if kind.is_symlink() {
        WireType::FILE_TYPE_SYMLINK
    } else {
        WireType::FILE_TYPE_UNSPECIFIED
    }
}

/// Where a link leads in the end. For one that leads nowhere, or round in a circle, the path that it names.
fn target(path: &Path) -> String {
    let named = || {
        let named = fs::read_link(path).ok()?;
        let above = fs::canonicalize(path.parent()?).ok()?;
        Some(plain(&above.join(named)))
    };
    let end = fs::canonicalize(path).ok().or_else(named).unwrap_or_else(|| path.to_owned());
    end.to_string_lossy().into_owned()
}

/// An absolute path without `.` and `..`.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::Normal(name) => plain.push(name),
            Component::ParentDir => {
                plain.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    plain
}

fn modified(metadata: &Metadata) -> Timestamp {
    let nanos = i32::try_from(metadata.mtime_nsec()).unwrap_or(0);
    Timestamp { seconds: metadata.mtime(), nanos, ..Timestamp::default() }
}

/// Type and permissions as published clients know them: `-rw-r--r--`, `drwxr-xr-x`, `Lrwxrwxrwx`.
fn permissions(metadata: &Metadata) -> String {
    let (kind, mode) = (metadata.file_type(), metadata.mode());
    let mut text = String::with_capacity(12);
    let kinds = [
        (kind.is_dir(), 'd'),
        (kind.is_symlink(), 'L'),
        (kind.is_block_device() || kind.is_char_device(), 'D'),
        (kind.is_fifo(), 'p'),
        (kind.is_socket(), 'S'),
        (mode & SET_UID != 0, 'u'),
        (mode & SET_GID != 0, 'g'),
        (kind.is_char_device(), 'c'),
        (mode & STICKY != 0, 't'),
    ];
    text.extend(kinds.iter().filter(|(is, _)| *is).map(|(_, letter)| letter));
    if text.is_empty() {
        text.push('-');
    }
    for (bit, letter) in (0..9).rev().zip("rwxrwxrwx".chars()) {
        text.push(if mode & (1 << bit) != 0 { letter } else { '-' });
    }
    text
}

#[cfg(test)]
mod tests {
    use std::{
        ffi::OsStr,
        os::unix::{
            ffi::OsStrExt,
            fs::{PermissionsExt, symlink},
        },
    };

    use super::*;

    #[test]
    fn files_directories_and_links() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
        fs::write(path("file"), "hello").unwrap();
        fs::set_permissions(path("file"), fs::Permissions::from_mode(0o640)).unwrap();
        fs::create_dir(path("dir")).unwrap();
        symlink("file", path("link")).unwrap();
        symlink("nowhere", path("broken")).unwrap();
        let accounts = Accounts::new("me:x:0:0::/:\n", "us:x:0:\n");
        let entry = |name: &str| describe(Path::new(&path(name)), &accounts).unwrap();

        let file = entry("file");
        assert_eq!((file.name.as_str(), file.size, file.mode), ("file", 5, 0o640));
        assert_eq!((file.owner.as_str(), file.group.as_str()), ("me", "us"));
        assert_eq!(file.permissions, "-rw-r-----");
        assert_eq!(file.r#type, WireType::FILE_TYPE_FILE);
        assert_eq!(file.symlink_target, None);

        assert_eq!(entry("dir").permissions, "drwxr-xr-x");
        assert_eq!(entry("dir").r#type, WireType::FILE_TYPE_DIRECTORY);

        let link = entry("link");
        assert_eq!(link.permissions, "Lrwxrwxrwx");
        assert_eq!(link.r#type, WireType::FILE_TYPE_FILE);
        let real = fs::canonicalize(path("file")).unwrap();
        assert_eq!(link.symlink_target.as_deref(), real.to_str());
        assert_eq!(link.path, path("link"));

        assert_eq!(link.mode, 0o640, "as of the target");

        symlink("chain", path("round")).unwrap();
        symlink("./round", path("chain")).unwrap();
        symlink("link", path("to-link")).unwrap();
        let real =
            |name: &str| fs::canonicalize(directory.path()).unwrap().join(name).to_str().map(str::to_owned);
        for (name, target) in [("broken", "nowhere"), ("round", "chain"), ("chain", "round")] {
            let broken = entry(name);
            assert_eq!((broken.r#type, broken.mode), (WireType::FILE_TYPE_UNSPECIFIED.into(), 0));
            assert_eq!(broken.symlink_target, real(target));
        }
        assert_eq!(entry("to-link").symlink_target, real("file"));
    }

    #[test]
    fn every_kind_of_permissions() {
        let directory = tempfile::tempdir().unwrap();
        let accounts = Accounts::default();
        let of = |path: &Path| describe(path, &accounts).unwrap().permissions;
        let file = directory.path().join("file");
        fs::write(&file, "").unwrap();
        for (mode, text) in [
            (0o4755, "urwxr-xr-x"),
            (0o2755, "grwxr-xr-x"),
            (0o6711, "ugrwx--x--x"),
            (0o1000, "t---------"),
            (0o0, "----------"),
            (0o7777, "ugtrwxrwxrwx"),
        ] {
            fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(of(&file), text);
        }
        let pipe = directory.path().join("pipe");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        assert_eq!(of(&pipe), "prw-------");
        let socket = directory.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        assert!(of(&socket).starts_with('S'));
        assert_eq!(of(Path::new("/dev/null")), "Dcrw-rw-rw-");
        assert_eq!(of(Path::new("/tmp")), "dtrwxrwxrwx");
    }

    #[test]
    fn a_name_that_is_no_text_and_an_owner_without_a_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(OsStr::from_bytes(b"a\xffb"));
        fs::write(&path, "").unwrap();
        std::os::unix::fs::chown(&path, Some(4_000_000_000), Some(4_000_000_001)).unwrap();
        let entry = describe(&path, &Accounts::default()).unwrap();
        assert_eq!(entry.name, "a\u{fffd}b");
        assert_eq!((entry.owner.as_str(), entry.group.as_str()), ("4000000000", "4000000001"));
    }
}
