//! What a client is told of a file.

use std::{
    fs::{self, FileType, Metadata},
    io,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::Path,
};

use buffa_types::google::protobuf::Timestamp;
use wrenn_proto::filesystem::{EntryInfo, FileType as WireType};

use crate::agent::{paths, users::Accounts};

const SET_UID: u32 = 0o4000;
const SET_GID: u32 = 0o2000;
const STICKY: u32 = 0o1000;

/// Describes `path` itself. A symbolic link has the type of what it leads to, and says where that is; where it leads
/// nowhere its type is not specified.
pub(crate) fn describe(path: &str, accounts: &Accounts) -> io::Result<EntryInfo> {
    let metadata = fs::symlink_metadata(path)?;
    let (kind, target) = if metadata.is_symlink() {
        let kind = fs::metadata(path)
            .map_or(WireType::FILE_TYPE_UNSPECIFIED, |target| wire_type(target.file_type()));
        (kind, Some(target(path)))
    } else {
        (wire_type(metadata.file_type()), None)
    };
    Ok(EntryInfo {
        name: paths::name(path).to_owned(),
        r#type: kind.into(),
        path: path.to_owned(),
        size: i64::try_from(metadata.len()).unwrap_or(i64::MAX),
        mode: metadata.mode() & 0o777,
        permissions: permissions(&metadata),
        owner: accounts.user_name(metadata.uid()),
        group: accounts.group_name(metadata.gid()),
        modified_time: modified(&metadata).into(),
        symlink_target: target,
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

/// Where a link leads in the end; for one that leads nowhere, what it says.
fn target(path: &str) -> String {
    let end = fs::canonicalize(path).or_else(|_| fs::read_link(path)).unwrap_or_default();
    end.to_string_lossy().into_owned()
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

/// Whether something, a broken link included, has this path.
pub(crate) fn exists(path: &str) -> bool {
    fs::symlink_metadata(Path::new(path)).is_ok()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

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
        let entry = |name: &str| describe(&path(name), &accounts).unwrap();

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

        let broken = entry("broken");
        assert_eq!(broken.r#type, WireType::FILE_TYPE_UNSPECIFIED);
        assert_eq!(broken.symlink_target.as_deref(), Some("nowhere"));

        assert_eq!(describe("/dev/null", &accounts).unwrap().permissions, "Dcrw-rw-rw-");
        assert_eq!(describe("/tmp", &accounts).unwrap().permissions, "dtrwxrwxrwx");
    }
}
