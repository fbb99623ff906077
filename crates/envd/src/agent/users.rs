//! Users and groups, read from `/etc/passwd` and `/etc/group`.
//!
//! The C library's own lookup loads modules named in the guest's configuration, which a static program must
//! not do. The two files are small and may change while the guest runs, so they are read anew for each
//! request. Lines that are not well formed are passed over, as the C library does.

use std::{collections::HashSet, fs, io};

use wrenn_guest_linux::spawn::Identity;

/// How many bytes of each file are looked at.
const MAXIMUM: u64 = 8 << 20;

/// How many groups the kernel lets a process have.
const MAXIMUM_GROUPS: usize = 65_536;

/// A user of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) name: String,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) home: String,
    pub(crate) shell: String,
}

/// Why there is nobody to do something as. The texts are part of the contract.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UserError {
    #[error("invalid username: '{0}'")]
    Unknown(String),
    #[error("cannot read the user database")]
    Accounts(#[source] io::Error),
}

/// The two files.
#[derive(Debug, Clone, Default)]
pub(crate) struct Accounts {
    passwd: String,
    group: String,
}

impl Accounts {
    /// Reads both files. Absent files are files without lines; `root` exists without a line of its own.
    pub(crate) fn load() -> io::Result<Self> {
        Ok(Self::of(&read("/etc/passwd")?, &read("/etc/group")?))
    }

    /// Reads both files and finds the user of a request: whom it names, else the default.
    pub(crate) fn load_with_user(name: Option<&str>, default: &str) -> Result<(Self, User), UserError> {
        let accounts = Self::load().map_err(UserError::Accounts)?;
        let name = name.unwrap_or(default);
        let user = accounts.user(name).ok_or_else(|| UserError::Unknown(name.to_owned()))?;
        Ok((accounts, user))
    }

    /// Of the content of the two files. What is no text in it is replaced, and then names nobody.
    fn of(passwd: &[u8], group: &[u8]) -> Self {
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        Self { passwd: text(passwd), group: text(group) }
    }

    #[cfg(test)]
    pub(crate) fn new(passwd: &str, group: &str) -> Self {
        Self { passwd: passwd.to_owned(), group: group.to_owned() }
    }

    /// Finds a user by name.
    pub(crate) fn user(&self, name: &str) -> Option<User> {
        let found = self.users().find(|user| user.name == name);
        found.or_else(|| (name == "root").then(root))
    }

    /// The name of a user number, or the number itself.
    pub(crate) fn user_name(&self, uid: u32) -> String {
        match self.users().find(|user| user.uid == uid) {
            Some(user) => user.name,
            None if uid == 0 => root().name,
            None => uid.to_string(),
        }
    }

    /// The name of a group number, or the number itself.
    pub(crate) fn group_name(&self, gid: u32) -> String {
        let found = self.groups().find(|(_, number, _)| *number == gid);
        found.map_or_else(|| gid.to_string(), |(name, _, _)| name.to_owned())
    }

    /// The number of a group.
    pub(crate) fn group(&self, name: &str) -> Option<u32> {
        self.groups().find(|(group, _, _)| *group == name).map(|(_, gid, _)| gid)
    }

    /// What a process of `user` runs as: the user, the primary group, and every group that lists the user.
    pub(crate) fn identity(&self, user: &User) -> Identity {
        let mut groups = vec![user.gid];
        let mut seen = HashSet::from([user.gid]);
        for (_, gid, members) in self.groups() {
            if groups.len() == MAXIMUM_GROUPS {
                break;
            }
            if members.split(',').any(|member| member == user.name) && seen.insert(gid) {
                groups.push(gid);
            }
        }
        Identity { uid: user.uid, gid: user.gid, groups }
    }

    fn users(&self) -> impl Iterator<Item = User> + '_ {
        self.passwd.lines().filter_map(parse_user)
    }

    /// Name, number and members of each group.
    fn groups(&self) -> impl Iterator<Item = (&str, u32, &str)> + '_ {
        self.group.lines().filter_map(|line| {
            let mut fields = line.split(':');
            let (name, _, gid) = (fields.next()?, fields.next()?, fields.next()?);
            let gid = gid.parse().ok().filter(|gid| *gid != u32::MAX)?;
            Some((name, gid, fields.next().unwrap_or_default()))
        })
    }
}

fn parse_user(line: &str) -> Option<User> {
    let mut fields = line.split(':');
    let (name, _, uid, gid) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
    let (_, home, shell) = (fields.next()?, fields.next()?, fields.next().unwrap_or_default());
    let (uid, gid) = (uid.parse().ok()?, gid.parse().ok()?);
    // The highest number means "do not change" to the kernel: such a line would leave a process root.
    if name.is_empty() || uid == u32::MAX || gid == u32::MAX {
        return None;
    }
    let home = if home.starts_with('/') { home } else { "/" };
    let shell = if shell.is_empty() { "/bin/sh" } else { shell };
    Some(User { name: name.to_owned(), uid, gid, home: home.to_owned(), shell: shell.to_owned() })
}

fn root() -> User {
    User { name: "root".to_owned(), uid: 0, gid: 0, home: "/root".to_owned(), shell: "/bin/sh".to_owned() }
}

fn read(path: &str) -> io::Result<Vec<u8>> {
    use io::Read;
    // Room for what it is nearly always: reading into none takes a call for every doubling.
    let mut bytes = Vec::with_capacity(8 * 1024);
    match fs::File::open(path) {
        Ok(file) => file.take(MAXIMUM).read_to_end(&mut bytes)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(bytes),
        Err(error) => return Err(error),
    };
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\n\nbroken\nuser:x:1000:1001:,,,:/home/user:/bin/bash\n\
                          evil:x:4294967295:0::/:/bin/sh\nbare:x:7:7::relative:\n";
    const GROUP: &str =
        "root:x:0:\nsudo:x:27:user,other\nuser:x:1001:\ntty:x:5:other,user\nbroken:x:y:user\n";

    #[test]
    fn a_user_has_every_group_that_names_it() {
        let accounts = Accounts::new(PASSWD, GROUP);
        let user = accounts.user("user").unwrap();
        assert_eq!((user.uid, user.gid, user.home.as_str()), (1000, 1001, "/home/user"));
        assert_eq!(accounts.identity(&user).groups, [1001, 27, 5]);
        assert_eq!(accounts.user_name(1000), "user");
        assert_eq!(accounts.group_name(27), "sudo");
        assert_eq!(accounts.group_name(28), "28");
        assert_eq!(accounts.group("tty"), Some(5));
    }

    #[test]
    fn odd_lines_do_no_harm() {
        let accounts = Accounts::new(PASSWD, GROUP);
        assert_eq!(accounts.user("broken"), None);
        assert_eq!(accounts.user("evil"), None, "its number would mean: stay root");
        assert_eq!(accounts.user(""), None);
        let bare = accounts.user("bare").unwrap();
        assert_eq!((bare.home.as_str(), bare.shell.as_str()), ("/", "/bin/sh"));
        assert_eq!(Accounts::default().user("root").unwrap().uid, 0);
        assert_eq!(Accounts::default().user_name(0), "root");
        assert_eq!(Accounts::default().user("user"), None);
    }

    fn bytes() -> impl Strategy<Value = Vec<u8>> {
        let line = "[a-c]{0,2}:x?:[0-9]{0,11}:[0-9]{0,11}:[a-c,:]{0,5}:/?[a-c]{0,3}:?[a-c/]{0,3}\n";
        prop_oneof![
            prop::collection::vec(any::<u8>(), 0..300),
            prop::collection::vec(line, 0..20).prop_map(|lines| lines.concat().into_bytes()),
        ]
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(passwd in bytes(), group in bytes(), name in "[a-c]{0,2}|.{0,8}") {
            let accounts = Accounts::of(&passwd, &group);
            if let Some(user) = accounts.user(&name) {
                prop_assert_eq!(&user.name, &name);
                prop_assert!(!name.is_empty());
                prop_assert!(user.home.starts_with('/') && !user.shell.is_empty());
                let identity = accounts.identity(&user);
                prop_assert_eq!((identity.uid, identity.gid), (user.uid, user.gid));
                prop_assert_eq!(identity.groups.first(), Some(&user.gid));
                // The highest number would leave a process what it was before: root.
                prop_assert!(identity.uid != u32::MAX && !identity.groups.contains(&u32::MAX));
                let different: HashSet<_> = identity.groups.iter().collect();
                prop_assert_eq!(different.len(), identity.groups.len());
            }
            // Whoever is not named is called by the number.
            let text = accounts.group_name(4_000_000_007);
            prop_assert!(text == "4000000007" || accounts.group(&text).is_some());
        }
    }

    #[test]
    fn more_groups_than_a_process_may_have() {
        let group: String = (0..70_000).map(|gid| format!("g{gid}:x:{gid}:a\n")).collect();
        let accounts = Accounts::new("a:x:5:5::/:\n", &group);
        assert_eq!(accounts.identity(&accounts.user("a").unwrap()).groups.len(), MAXIMUM_GROUPS);
    }
}
