//! What a path of a request means.
//!
//! | given | means |
//! |---|---|
//! | nothing | the default working directory, else the user's home |
//! | `~`, `~/x` | the user's home, and below it |
//! | `~x` | nothing: the homes of others are not looked up, and nobody means a file of that name |
//! | `x/y` | below the user's home |
//! | `/x/y` | itself |
//!
//! The answer is absolute, and `.`, `..` and doubled slashes are resolved by their text alone, as published
//! clients expect. Nothing is confined: whoever may speak to the agent owns the guest.

use super::users::User;

/// The longest path that the kernel takes.
const MAXIMUM: usize = 4095;

/// Why a path cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum PathError {
    #[error("path contains a zero byte")]
    ZeroByte,
    #[error("path is longer than {MAXIMUM} bytes")]
    TooLong,
    #[error("cannot expand user-specific home dir")]
    OtherHome,
}

/// Resolves `path` for `user`.
pub(crate) fn resolve(path: &str, user: &User, default_directory: Option<&str>) -> Result<String, PathError> {
    if path.starts_with('~') && path != "~" && !path.starts_with("~/") {
        return Err(PathError::OtherHome);
    }
    let resolved = match path {
        "" => normalise(&user.home, default_directory.unwrap_or_default()),
        "~" => normalise(&user.home, ""),
        _ => normalise(&user.home, path.strip_prefix("~/").unwrap_or(path)),
    };
    if path.contains('\0') || resolved.contains('\0') {
        return Err(PathError::ZeroByte);
    }
    if resolved.len() > MAXIMUM { Err(PathError::TooLong) } else { Ok(resolved) }
}

/// `path` below `base` unless it is absolute, without `.`, `..` and empty parts.
fn normalise(base: &str, path: &str) -> String {
    let base = if path.starts_with('/') { "" } else { base };
    let mut parts: Vec<&str> = Vec::new();
    for part in base.split('/').chain(path.split('/')) {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            name => parts.push(name),
        }
    }
    format!("/{}", parts.join("/"))
}

/// The last part of a resolved path; the root has none and is called by its own name.
pub(crate) fn name(path: &str) -> &str {
    match path.rsplit('/').next() {
        Some(name) if !name.is_empty() => name,
        _ => "/",
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn user() -> User {
        User {
            name: "user".to_owned(),
            uid: 1000,
            gid: 1000,
            home: "/home/user".to_owned(),
            shell: "/bin/bash".to_owned(),
        }
    }

    #[test]
    fn every_form_of_a_path() {
        let table = [
            ("", "/work"),
            ("~", "/home/user"),
            ("~/a", "/home/user/a"),
            ("./~x", "/home/user/~x"),
            ("a/./b", "/home/user/a/b"),
            ("../../../../etc", "/etc"),
            ("/", "/"),
            ("//a//b/", "/a/b"),
            ("/..", "/"),
            ("~//etc", "/etc"),
        ];
        for (given, wanted) in table {
            assert_eq!(resolve(given, &user(), Some("/work")).as_deref(), Ok(wanted), "{given:?}");
        }
        assert_eq!(resolve("", &user(), None).as_deref(), Ok("/home/user"));
        assert_eq!(resolve("~x", &user(), None), Err(PathError::OtherHome));
        assert_eq!(resolve("a\0b", &user(), None), Err(PathError::ZeroByte));
        assert_eq!(resolve(&"a".repeat(5000), &user(), None), Err(PathError::TooLong));
        assert_eq!((name("/a/b"), name("/")), ("b", "/"));
    }

    proptest! {
        #[test]
        fn a_resolved_path_is_absolute_and_plain(
            path in "[a~./ ]{0,40}|.{0,60}",
            home in "/[a./]{0,10}",
            default in prop::option::of(".{0,10}"),
        ) {
            let user = User { home, ..user() };
            let resolved = match resolve(&path, &user, default.as_deref()) {
                Ok(resolved) => resolved,
                Err(PathError::ZeroByte) => {
                    prop_assert!(path.contains('\0') || default.unwrap().contains('\0'));
                    return Ok(());
                }
                Err(PathError::OtherHome) => {
                    prop_assert!(path.starts_with('~'));
                    return Ok(());
                }
                Err(PathError::TooLong) => unreachable!("it is short"),
            };
            prop_assert!(resolved.starts_with('/') && !resolved.contains('\0') && resolved.len() <= MAXIMUM);
            prop_assert!(resolved.split('/').skip(1).all(|part| part != "." && part != ".."));
            prop_assert!(!resolved.contains("//"));
            prop_assert!(resolved == "/" || !name(&resolved).contains('/'));
            prop_assert_eq!(resolve(&resolved, &user, None).unwrap(), resolved);
        }

        #[test]
        fn no_path_is_longer_than_the_kernel_takes(parts in prop::collection::vec("[a-z]{1,300}", 0..40)) {
            let path = parts.join("/");
            match resolve(&path, &user(), None) {
                Ok(resolved) => prop_assert!(resolved.len() <= MAXIMUM),
                Err(error) => {
                    prop_assert_eq!(error, PathError::TooLong);
                    prop_assert!(path.len() > 4000);
                }
            }
        }
    }
}
