//! The two manifests of the images directory: text in, checked values out.
//!
//! Each manifest begins with its format, a number. It is read before everything else, so that a newer
//! format is refused as such and not for a field that it happens to have. In a known format every field
//! is known: one that is not is a mistake, and refused.

use serde::{Deserialize, de::DeserializeOwned};
use wrenn_types::{DiskMib, TemplateName};

/// The formats that this program reads.
const FORMAT: u32 = 1;
/// How many hexadecimal digits name a content.
const CONTENT_ID_DIGITS: usize = 16;

/// Why a manifest is not one.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// It is of a format that this program does not read.
    #[error("its format is {found}, and this program reads format {FORMAT}")]
    Format {
        /// The number in it.
        found: u32,
    },
    /// It is not JSON, or lacks a field, or has one that is not valid or not known.
    #[error("it does not say what it must")]
    Content(#[source] serde_json::Error),
}

/// A value in a manifest that is not of its form.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{given:?} is not {form}")]
pub struct FormError {
    given: String,
    form: &'static str,
}

/// A text of a checked form, which serde checks too.
macro_rules! checked_text {
    ($(#[$doc:meta])* $name:ident, $form:literal, $check:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
        #[serde(try_from = "String")]
        pub struct $name(String);

        impl $name {
            /// The text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = FormError;

            fn try_from(given: String) -> Result<Self, FormError> {
                let check: fn(&str) -> bool = $check;
                if check(&given) { Ok(Self(given)) } else { Err(FormError { given, form: $form }) }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

checked_text!(
    /// What a file is, by its content and its recipe.
    ContentId,
    "16 lower-case hexadecimal digits",
    |text| {
        text.len() == CONTENT_ID_DIGITS && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    }
);

checked_text!(
    /// The name of a file beside the manifest: never a way out of the directory.
    FileName,
    "the name of a file in the same directory",
    |text| {
        !text.starts_with('.')
            && !text.is_empty()
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
    }
);

checked_text!(
    /// A user of the guest, as Debian's `adduser` takes it.
    UserName,
    "a user name: a letter or underscore, then up to 31 letters, digits, underscores and dashes",
    |text| {
        let mut bytes = text.bytes();
        text.len() <= 32
            && bytes.next().is_some_and(|b| b.is_ascii_lowercase() || b == b'_')
            && bytes.all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'_' | b'-'))
    }
);

checked_text!(
    /// A directory of the guest.
    GuestDirectory,
    "an absolute path of the guest",
    |text| text.starts_with('/') && text.len() <= 4095 && !text.contains(|c: char| c.is_control())
);

/// Another name of a template.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Alias {
    /// The name.
    pub name: TemplateName,
    /// As whom a command runs that does not say, when the template was asked for by this name.
    pub default_user: UserName,
    /// And where it runs.
    pub default_workdir: GuestDirectory,
}

/// `guest/manifest.json`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestManifest {
    /// Hash of everything in the bundle.
    pub id: ContentId,
    /// As the kernel calls itself.
    pub kernel_version: String,
    /// As envd calls itself.
    pub envd_version: String,
    /// The kernel, beside the manifest.
    pub kernel: FileName,
    /// The initramfs, beside the manifest.
    pub initramfs: FileName,
}

/// `templates/NAME/template.json`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TemplateManifest {
    /// The template's name.
    pub name: TemplateName,
    /// Its other names.
    pub aliases: Vec<Alias>,
    /// As whom a command runs that does not say.
    pub default_user: UserName,
    /// And where it runs.
    pub default_workdir: GuestDirectory,
    /// The image, beside the manifest.
    pub image: FileName,
    /// What the image is.
    pub image_id: ContentId,
    /// The smallest disk on which it runs.
    pub minimum_disk: DiskMib,
}

impl GuestManifest {
    /// Reads the text of the file.
    ///
    /// # Errors
    /// [`ManifestError`] says what is wrong.
    pub fn parse(text: &str) -> Result<Self, ManifestError> {
        let raw: RawGuest = parse(text)?;
        Ok(Self {
            id: raw.id,
            kernel_version: raw.kernel_version,
            envd_version: raw.envd_version,
            kernel: raw.kernel,
            initramfs: raw.initramfs,
        })
    }
}

impl TemplateManifest {
    /// Reads the text of the file.
    ///
    /// # Errors
    /// [`ManifestError`] says what is wrong.
    pub fn parse(text: &str) -> Result<Self, ManifestError> {
        let raw: RawTemplate = parse(text)?;
        Ok(Self {
            name: raw.name,
            aliases: raw.aliases,
            default_user: raw.default_user,
            default_workdir: raw.default_workdir,
            image: raw.image,
            image_id: raw.image_id,
            minimum_disk: raw.minimum_disk_mib,
        })
    }
}

/// What every format has.
#[derive(Deserialize)]
struct AnyFormat {
    format: u32,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawGuest {
    #[serde(rename = "format")]
    _format: u32,
    id: ContentId,
    kernel_version: String,
    envd_version: String,
    kernel: FileName,
    initramfs: FileName,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTemplate {
    #[serde(rename = "format")]
    _format: u32,
    name: TemplateName,
    aliases: Vec<Alias>,
    default_user: UserName,
    default_workdir: GuestDirectory,
    image: FileName,
    image_id: ContentId,
    minimum_disk_mib: DiskMib,
}

fn parse<T: DeserializeOwned>(text: &str) -> Result<T, ManifestError> {
    let any: AnyFormat = serde_json::from_str(text).map_err(ManifestError::Content)?;
    if any.format != FORMAT {
        return Err(ManifestError::Format { found: any.format });
    }
    serde_json::from_str(text).map_err(ManifestError::Content)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn guest() -> Value {
        json!({
            "format": 1, "id": "0011223344556677", "kernel_version": "6.1.0", "envd_version": "0.1.0",
            "kernel": "vmlinuz", "initramfs": "initramfs.img",
        })
    }

    fn template() -> Value {
        json!({
            "format": 1, "name": "base",
            "aliases": [{"name": "minimal", "default_user": "wrenn-user", "default_workdir": "/home/wrenn-user"}],
            "default_user": "user", "default_workdir": "/home/user",
            "image": "image.ext4", "image_id": "8899aabbccddeeff", "minimum_disk_mib": 1024,
        })
    }

    /// Parses `manifest` with one field set to another value.
    fn with<T>(
        mut manifest: Value,
        field: &str,
        value: Value,
        parse: fn(&str) -> Result<T, ManifestError>,
    ) -> Result<T, ManifestError> {
        manifest[field] = value;
        parse(&manifest.to_string())
    }

    #[test]
    fn a_good_manifest_says_what_it_says() {
        let guest = GuestManifest::parse(&guest().to_string()).unwrap();
        assert_eq!((guest.kernel.as_str(), guest.id.as_str()), ("vmlinuz", "0011223344556677"));
        let template = TemplateManifest::parse(&template().to_string()).unwrap();
        assert_eq!(template.aliases[0].default_user.as_str(), "wrenn-user");
    }

    #[test]
    fn another_format_is_refused_before_its_fields_are_read() {
        let newer = json!({"format": 2, "something": "else"}).to_string();
        assert!(matches!(GuestManifest::parse(&newer), Err(ManifestError::Format { found: 2 })));
        assert!(matches!(TemplateManifest::parse(&newer), Err(ManifestError::Format { found: 2 })));
    }

    #[test]
    fn unknown_and_missing_fields_are_refused() {
        assert!(with(guest(), "colour", json!("green"), GuestManifest::parse).is_err());
        assert!(with(template(), "colour", json!("green"), TemplateManifest::parse).is_err());
        for manifest in [guest(), template()] {
            for field in manifest.as_object().unwrap().keys() {
                let mut less = manifest.clone();
                less.as_object_mut().unwrap().remove(field);
                let text = less.to_string();
                assert!(
                    GuestManifest::parse(&text).is_err() && TemplateManifest::parse(&text).is_err(),
                    "{field}"
                );
            }
        }
    }

    #[test]
    fn a_file_is_beside_the_manifest() {
        for name in ["", ".", "..", "../kernel", "/etc/passwd", "a/b", ".hidden", "a\0b", "a b"] {
            assert!(with(guest(), "kernel", json!(name), GuestManifest::parse).is_err(), "{name:?}");
            assert!(with(template(), "image", json!(name), TemplateManifest::parse).is_err(), "{name:?}");
        }
    }

    #[test]
    fn values_are_of_their_form() {
        for id in ["", "0011", "0011223344556677a", "001122334455667G", "AABBCCDDEEFF0011"] {
            assert!(with(guest(), "id", json!(id), GuestManifest::parse).is_err(), "{id:?}");
        }
        for (field, value) in [
            ("default_user", json!("Root user")),
            ("default_user", json!("-root")),
            ("default_user", json!("x".repeat(33))),
            ("default_workdir", json!("home")),
            ("default_workdir", json!("/home\n")),
            ("minimum_disk_mib", json!(0)),
            ("minimum_disk_mib", json!(-1)),
            ("name", json!("../base")),
        ] {
            assert!(
                with(template(), field, value.clone(), TemplateManifest::parse).is_err(),
                "{field} {value}"
            );
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(text in ".{0,200}") {
            let _ = GuestManifest::parse(&text);
            let _ = TemplateManifest::parse(&text);
        }

        #[test]
        fn a_file_name_stays_in_its_directory(text in ".{0,40}") {
            if let Ok(name) = FileName::try_from(text) {
                let path = camino::Utf8Path::new("/images/guest").join(name.as_str());
                prop_assert_eq!(path.parent().unwrap(), "/images/guest");
                prop_assert_eq!(path.file_name(), Some(name.as_str()));
            }
        }
    }
}
