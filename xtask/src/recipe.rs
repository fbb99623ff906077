//! A template's recipe: text in, checked values out. The language is described in `guest/templates/base/recipe`.

use anyhow::{Context as _, Result, bail, ensure};

/// What a template is made of.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Recipe {
    pub(crate) suite: String,
    pub(crate) packages: Vec<String>,
    pub(crate) users: Vec<User>,
    pub(crate) default: Identity,
    pub(crate) aliases: Vec<Alias>,
    /// What is done to the tree once the packages are in it, in the order of the recipe.
    pub(crate) changes: Vec<Change>,
    pub(crate) free_mib: u64,
}

/// A user of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) name: String,
    pub(crate) id: u32,
    pub(crate) sudo: bool,
}

/// As whom and where commands run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) user: String,
    pub(crate) directory: String,
}

/// Another name of the template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Alias {
    pub(crate) name: String,
    pub(crate) identity: Identity,
}

/// One change to the tree. Paths are relative to its root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Change {
    Directory { path: String, mode: u32 },
    Open { path: String },
    File { path: String, mode: u32, content: String },
    Remove { path: String },
}

/// Reads a recipe.
pub(crate) fn parse(text: &str) -> Result<Recipe> {
    let mut recipe = Recipe::default();
    let mut lines = text.lines().enumerate().peekable();
    while let Some((number, line)) = lines.next() {
        if line.trim().is_empty() || line.starts_with('#') {
            continue;
        }
        let mut statement = || {
            ensure!(
                !line.starts_with(char::is_whitespace),
                "an indented line is the content of a file, and none is open"
            );
            let line = line.split(" #").next().unwrap_or(line);
            let words: Vec<&str> = line.split_whitespace().collect();
            add(&mut recipe, &words)
        };
        statement().with_context(|| format!("line {}: {line}", number + 1))?;
        if let Some(Change::File { content, .. }) = recipe.changes.last_mut()
            && line.starts_with("file ")
        {
            while let Some((_, line)) = lines.next_if(|(_, line)| line.starts_with("  ")) {
                content.push_str(line.strip_prefix("  ").unwrap_or(line));
                content.push('\n');
            }
        }
    }
    check(&recipe)?;
    Ok(recipe)
}

fn add(recipe: &mut Recipe, words: &[&str]) -> Result<()> {
    match *words {
        ["suite", suite] => recipe.suite = word(suite)?,
        ["package", package] => recipe.packages.push(word(package)?),
        ["user", name, id] => recipe.users.push(User { name: word(name)?, id: id.parse()?, sudo: false }),
        ["user", name, id, "sudo"] => {
            recipe.users.push(User { name: word(name)?, id: id.parse()?, sudo: true })
        }
        ["default", user, directory] => recipe.default = identity(user, directory)?,
        ["alias", name, user, directory] => {
            recipe.aliases.push(Alias { name: word(name)?, identity: identity(user, directory)? });
        }
        ["directory", mode, path] => {
            recipe.changes.push(Change::Directory { path: relative(path)?, mode: octal(mode)? });
        }
        ["open", path] => recipe.changes.push(Change::Open { path: relative(path)? }),
        ["file", mode, path] => {
            recipe.changes.push(Change::File {
                path: relative(path)?,
                mode: octal(mode)?,
                content: String::new(),
            });
        }
        ["remove", path] => recipe.changes.push(Change::Remove { path: relative(path)? }),
        ["free", mib] => recipe.free_mib = mib.parse()?,
        [verb, ..] => bail!("`{verb}` is not a verb, or not with these arguments"),
        [] => {}
    }
    Ok(())
}

fn check(recipe: &Recipe) -> Result<()> {
    ensure!(!recipe.suite.is_empty(), "no `suite` is given");
    ensure!(!recipe.packages.is_empty(), "no `package` is given");
    let known = |user: &str| user == "root" || recipe.users.iter().any(|known| known.name == user);
    for Identity { user, .. } in
        std::iter::once(&recipe.default).chain(recipe.aliases.iter().map(|alias| &alias.identity))
    {
        ensure!(!user.is_empty(), "no `default` is given");
        ensure!(known(user), "there is no user {user}");
    }
    for (at, user) in recipe.users.iter().enumerate() {
        ensure!(user.id >= 1000, "{} has the number {}, which is below 1000", user.name, user.id);
        ensure!(
            recipe.users[..at].iter().all(|other| other.name != user.name && other.id != user.id),
            "the user {} {} is there twice",
            user.name,
            user.id
        );
    }
    Ok(())
}

/// Names go to command lines and into files of colon-separated fields.
fn word(text: &str) -> Result<String> {
    let starts_well = text.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
    let is_well = text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "+-.".contains(c));
    ensure!(starts_well && is_well, "{text:?} is not a name");
    Ok(text.to_owned())
}

fn identity(user: &str, directory: &str) -> Result<Identity> {
    relative(directory)?;
    Ok(Identity { user: word(user)?, directory: directory.to_owned() })
}

fn octal(mode: &str) -> Result<u32> {
    let value = u32::from_str_radix(mode, 8).with_context(|| format!("{mode:?} is not an octal mode"))?;
    ensure!(value <= 0o7777, "{mode:?} is not a mode");
    Ok(value)
}

/// An absolute path of the guest, as a path inside of the tree: never out of it.
fn relative(path: &str) -> Result<String> {
    let inside = path.strip_prefix('/').with_context(|| format!("{path:?} is not absolute"))?;
    ensure!(!inside.is_empty(), "{path:?} is the root itself");
    let plain = inside.split('/').all(|name| !matches!(name, "" | "." | ".."));
    ensure!(plain, "{path:?} is not a plain path");
    Ok(inside.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: &str =
        "suite bookworm\npackage bash   # why\nuser user 1000 sudo\ndefault user /home/user\n";

    #[test]
    fn reads_every_verb() {
        let text = format!(
            "{SMALL}# comment\n\nuser other 1001\nalias minimal other /home/other\ndirectory 1777 /code\nopen /usr/local\n\
             file 0440 /etc/x\n  one\n\n  not content\n"
        );
        assert!(parse(&text).unwrap_err().to_string().starts_with("line 14"), "an empty line ends a file");
        let text = format!(
            "{SMALL}file 0440 /etc/x\n  one\n    two # kept\nfile 0644 /etc/empty\nremove /var/log/apt\nfree 300\n"
        );
        let recipe = parse(&text).unwrap();
        assert_eq!(recipe.packages, ["bash"]);
        assert_eq!(recipe.users, [User { name: "user".to_owned(), id: 1000, sudo: true }]);
        assert_eq!(recipe.free_mib, 300);
        assert_eq!(
            recipe.changes,
            [
                Change::File {
                    path: "etc/x".to_owned(),
                    mode: 0o440,
                    content: "one\n  two # kept\n".to_owned()
                },
                Change::File { path: "etc/empty".to_owned(), mode: 0o644, content: String::new() },
                Change::Remove { path: "var/log/apt".to_owned() },
            ]
        );
    }

    #[test]
    fn refuses_what_it_does_not_understand() {
        for line in [
            "packages bash",
            "package --option",
            "package Bash;x",
            "user user 1000",
            "user root 0",
            "user a:b 1005",
            "default nobody-there /",
            "default nobody-there /home",
            "directory 999 /code",
            "directory 0755 code",
            "remove /../etc/passwd",
            "remove /",
            "open /usr/./local",
            "free much",
            "  indented",
        ] {
            assert!(parse(&format!("{SMALL}{line}\n")).is_err(), "{line}");
        }
        assert!(parse("").is_err());
    }

    #[test]
    fn the_base_template_is_what_clients_expect() {
        let recipe = parse(include_str!("../../guest/templates/base/recipe")).unwrap();
        for package in
            ["bash", "ca-certificates", "curl", "git", "iproute2", "ncurses-bin", "procps", "python3", "sudo"]
        {
            assert!(recipe.packages.iter().any(|name| name == package), "{package}");
        }
        assert_eq!(recipe.default, Identity { user: "user".to_owned(), directory: "/home/user".to_owned() });
        let names: Vec<&str> = recipe.aliases.iter().map(|alias| alias.name.as_str()).collect();
        assert_eq!(names, ["minimal", "minimal-ubuntu"]);
        assert!(recipe.aliases.iter().all(|alias| alias.identity.user == "wrenn-user"));
        assert!(recipe.users.iter().all(|user| user.sudo));
    }
}
