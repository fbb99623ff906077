//! Entries of the guest's file system.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What an entry is. Sockets, pipes and devices are called files, because clients know no more words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum EntryType {
    /// A file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
}

/// One entry of a directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FileEntry {
    /// The last part of the path.
    pub name: String,
    /// The whole path.
    pub path: String,
    /// What it is.
    #[serde(rename = "type")]
    pub kind: EntryType,
    /// Bytes.
    pub size: i64,
    /// Permission bits as a number.
    pub mode: u32,
    /// Permission bits as `ls` writes them.
    pub permissions: String,
    /// The owner's name.
    pub owner: String,
    /// The group's name.
    pub group: String,
    /// Seconds since the Unix epoch.
    pub modified_at: i64,
    /// Where a symbolic link leads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub symlink_target: Option<String>,
}

/// A path in the guest. A relative one starts in the user's home directory.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PathRequest {
    /// The path.
    #[schema(example = "/home/user/data.txt")]
    pub path: String,
    /// The user to act as; the template's default when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

/// A directory to list.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ListFilesRequest {
    /// The directory.
    #[schema(example = "/home/user")]
    pub path: String,
    /// How many levels to go down; 1 when absent, and 0 means 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 0, maximum = 64)]
    pub depth: Option<i64>,
    /// The user to act as; the template's default when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

/// A file or directory to move. The directories above the destination are made.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MoveFileRequest {
    /// What to move.
    pub source: String,
    /// Its new path.
    pub destination: String,
    /// The user to act as; the template's default when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
}

/// The answer of `files/list`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FileList {
    /// The entries, parents before their children.
    pub entries: Vec<FileEntry>,
}

/// The answer of `files/stat`, `files/mkdir` and `files/move`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FileEntryBody {
    /// The entry.
    pub entry: FileEntry,
}
