//! The images that sandboxes start from: one guest bundle, and templates.
//!
//! ```text
//! DIR/guest/manifest.json          format, id, versions, names of the two files beside it
//!          /vmlinuz, vmlinux, initramfs.img        the second is the first, uncompressed
//! DIR/templates/NAME/template.json format, aliases, default user and directory, image and its id
//!                   /image.ext4
//! ```
//!
//! [`Images::load`] reads and checks all of it once, when the agent starts; what it says is then fixed.
//! Links on the way to a file are followed at that time, so that a build which turns them to new files
//! does not change what a running agent boots. [`manifest`] parses, and knows no files.
//!
//! A template has a name and aliases; an alias can have another default user and directory. All names
//! are one set: no two templates answer to the same one.

pub mod manifest;

use std::{collections::BTreeMap, fs, io, os::unix::fs::MetadataExt};

use camino::{Utf8Path, Utf8PathBuf};
use wrenn_types::{DiskMib, TemplateName};
use wrenn_vmm::{DiskFormat, DiskSpec, GuestBundle};

use manifest::{FileName, GuestManifest, ManifestError, TemplateManifest};

pub use manifest::{Alias, ContentId, GuestDirectory, UserName};

/// What to do when something is not there, or is too old or too new.
const REMEDY: &str = "`make images` builds it";

/// The name of the uncompressed kernel.
const UNCOMPRESSED: &str = "vmlinux";

/// Why the images cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ImagesError {
    /// A file or directory is not there.
    #[error("{what} is missing: there is no {path}; {REMEDY}")]
    Missing {
        /// What it is.
        what: &'static str,
        /// Where it should be.
        path: Utf8PathBuf,
    },
    /// A file or directory is there and cannot be read.
    #[error("could not read {path}")]
    Read {
        /// Which one.
        path: Utf8PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A manifest does not say what it must.
    #[error("{path} is not usable; {REMEDY} anew")]
    Manifest {
        /// Which one.
        path: Utf8PathBuf,
        /// What is wrong with it.
        #[source]
        source: ManifestError,
    },
    /// There is a guest, and nothing to run it on.
    #[error("no template is in {path}; `make images` builds `base`")]
    NoTemplates {
        /// The directory of templates.
        path: Utf8PathBuf,
    },
    /// No template has the name or alias that was asked for.
    #[error("there is no template {name}")]
    UnknownTemplate {
        /// The name.
        name: TemplateName,
    },
    /// A template's directory has another name than the template.
    #[error("{path} holds the template {name}: a template's directory has its name")]
    Misplaced {
        /// The directory.
        path: Utf8PathBuf,
        /// The name in the manifest.
        name: TemplateName,
    },
    /// Two templates answer to one name.
    #[error("both templates {one} and {other} have the name {name}")]
    Ambiguous {
        /// The name.
        name: TemplateName,
        /// One template.
        one: TemplateName,
        /// The other.
        other: TemplateName,
    },
    /// An image does not fit on the smallest disk that its template allows.
    #[error(
        "the image {path} has {bytes} bytes, more than the {minimum_disk_mib} MiB of its template; {REMEDY} anew"
    )]
    ImageTooLarge {
        /// The image.
        path: Utf8PathBuf,
        /// Its apparent size.
        bytes: u64,
        /// The template's smallest disk.
        minimum_disk_mib: u32,
    },
}

impl ImagesError {
    /// Whether the name that was asked for is at fault, and not the images.
    #[must_use]
    pub fn is_unknown_template(&self) -> bool {
        matches!(self, Self::UnknownTemplate { .. })
    }
}

/// All that sandboxes can start from on this host.
#[derive(Debug, Clone)]
pub struct Images {
    guest: Guest,
    templates: BTreeMap<TemplateName, Template>,
    /// Every alias, and the template that has it.
    aliases: BTreeMap<TemplateName, TemplateName>,
}

/// The kernel and envd of every new sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guest {
    /// What a VMM driver takes.
    pub bundle: GuestBundle,
    /// As the kernel calls itself.
    pub kernel_version: String,
    /// As envd calls itself.
    pub envd_version: String,
}

/// An image, and how it is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    /// Its name.
    pub name: TemplateName,
    /// Its other names, with the user and directory of each.
    pub aliases: Vec<Alias>,
    /// As whom a command runs that does not say, when it was asked for by its own name.
    pub default_user: UserName,
    /// And where it runs.
    pub default_workdir: GuestDirectory,
    /// The ext4 filesystem: a plain file that never changes.
    pub image: Utf8PathBuf,
    /// What the image is, by content and recipe.
    pub image_id: ContentId,
    /// The smallest disk on which it runs.
    pub minimum_disk: DiskMib,
    /// Blocks of the host's disk that the image takes, in bytes.
    pub size_bytes: u64,
}

impl Template {
    /// The image as the base of a disk.
    #[must_use]
    pub fn disk(&self) -> DiskSpec {
        DiskSpec { path: self.image.clone(), format: DiskFormat::Raw }
    }
}

/// A template as someone asked for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resolved<'a> {
    /// The template.
    pub template: &'a Template,
    /// The user that goes with the name that was asked for.
    pub default_user: &'a UserName,
    /// The directory that goes with it.
    pub default_workdir: &'a GuestDirectory,
}

impl Images {
    /// Reads and checks the directory.
    ///
    /// # Errors
    /// The first fault, with the file that has it and what to do about it.
    pub fn load(directory: &Utf8Path) -> Result<Self, ImagesError> {
        let guest = load_guest(&directory.join("guest"))?;
        let at = directory.join("templates");
        let mut templates = BTreeMap::new();
        for template in template_directories(&at)? {
            let template = load_template(&template)?;
            templates.insert(template.name.clone(), template);
        }
        if templates.is_empty() {
            return Err(ImagesError::NoTemplates { path: at });
        }
        let aliases = aliases_of(&templates)?;
        Ok(Self { guest, templates, aliases })
    }

    /// The same with the uncompressed kernel that lies beside the other one, for a VMM that starts no other.
    ///
    /// # Errors
    /// It is not there, because the images are of an earlier version.
    pub fn with_uncompressed_kernel(mut self) -> Result<Self, ImagesError> {
        let kernel = &mut self.guest.bundle.kernel;
        let path = kernel.with_file_name(UNCOMPRESSED);
        if !path.is_file() {
            return Err(ImagesError::Missing { what: "the guest's uncompressed kernel", path });
        }
        *kernel = path;
        Ok(self)
    }

    /// The guest bundle.
    #[must_use]
    pub fn guest(&self) -> &Guest {
        &self.guest
    }

    /// Every template once, in the order of the names.
    pub fn templates(&self) -> impl Iterator<Item = &Template> {
        self.templates.values()
    }

    /// The template with this name or alias.
    ///
    /// # Errors
    /// [`ImagesError::UnknownTemplate`] when there is none.
    pub fn resolve(&self, name: &TemplateName) -> Result<Resolved<'_>, ImagesError> {
        self.by_name(name)
            .or_else(|| self.by_alias(name))
            .ok_or_else(|| ImagesError::UnknownTemplate { name: name.clone() })
    }

    fn by_name(&self, name: &TemplateName) -> Option<Resolved<'_>> {
        let template = self.templates.get(name)?;
        let (default_user, default_workdir) = (&template.default_user, &template.default_workdir);
        Some(Resolved { template, default_user, default_workdir })
    }

    fn by_alias(&self, name: &TemplateName) -> Option<Resolved<'_>> {
        let template = self.templates.get(self.aliases.get(name)?)?;
        let alias = template.aliases.iter().find(|alias| alias.name == *name)?;
        let (default_user, default_workdir) = (&alias.default_user, &alias.default_workdir);
        Some(Resolved { template, default_user, default_workdir })
    }
}

fn aliases_of(
    templates: &BTreeMap<TemplateName, Template>,
) -> Result<BTreeMap<TemplateName, TemplateName>, ImagesError> {
    let mut aliases = BTreeMap::new();
    for template in templates.values() {
        for Alias { name, .. } in &template.aliases {
            let taken_by = match templates.get(name) {
                Some(other) => Some(other.name.clone()),
                None => aliases.insert(name.clone(), template.name.clone()),
            };
            if let Some(one) = taken_by {
                let (name, other) = (name.clone(), template.name.clone());
                return Err(ImagesError::Ambiguous { name, one, other });
            }
        }
    }
    Ok(aliases)
}

fn load_guest(directory: &Utf8Path) -> Result<Guest, ImagesError> {
    let path = directory.join("manifest.json");
    let manifest = GuestManifest::parse(&read(&path, "the guest bundle")?)
        .map_err(|source| ImagesError::Manifest { path, source })?;
    let bundle = GuestBundle {
        id: manifest.id.as_str().to_owned(),
        kernel: find(directory, &manifest.kernel, "the guest's kernel")?.0,
        initramfs: find(directory, &manifest.initramfs, "the guest's initramfs")?.0,
    };
    Ok(Guest { bundle, kernel_version: manifest.kernel_version, envd_version: manifest.envd_version })
}

fn template_directories(at: &Utf8Path) -> Result<Vec<Utf8PathBuf>, ImagesError> {
    let failed = |source| match is_missing(&source) {
        true => ImagesError::Missing { what: "the directory of templates", path: at.to_owned() },
        false => ImagesError::Read { path: at.to_owned(), source },
    };
    let mut directories = Vec::new();
    for entry in at.read_dir_utf8().map_err(failed)? {
        let entry = entry.map_err(failed)?;
        // What a build has not finished yet has a name that no template can have.
        if entry.file_name().parse::<TemplateName>().is_ok() {
            directories.push(entry.into_path());
        }
    }
    directories.sort();
    Ok(directories)
}

fn load_template(directory: &Utf8Path) -> Result<Template, ImagesError> {
    let path = directory.join("template.json");
    let manifest = TemplateManifest::parse(&read(&path, "a template's manifest")?)
        .map_err(|source| ImagesError::Manifest { path, source })?;
    if directory.file_name() != Some(manifest.name.as_str()) {
        return Err(ImagesError::Misplaced { path: directory.to_owned(), name: manifest.name });
    }
    let (image, metadata) = find(directory, &manifest.image, "a template's image")?;
    if metadata.len() > manifest.minimum_disk.bytes() {
        let minimum_disk_mib = manifest.minimum_disk.get();
        return Err(ImagesError::ImageTooLarge { path: image, bytes: metadata.len(), minimum_disk_mib });
    }
    Ok(Template {
        name: manifest.name,
        aliases: manifest.aliases,
        default_user: manifest.default_user,
        default_workdir: manifest.default_workdir,
        image,
        image_id: manifest.image_id,
        minimum_disk: manifest.minimum_disk,
        // The unit of `st_blocks` is 512 bytes on every filesystem.
        size_bytes: metadata.blocks() * 512,
    })
}

fn read(path: &Utf8Path, what: &'static str) -> Result<String, ImagesError> {
    fs::read_to_string(path).map_err(|source| match is_missing(&source) {
        true => ImagesError::Missing { what, path: path.to_owned() },
        false => ImagesError::Read { path: path.to_owned(), source },
    })
}

/// The file that a manifest names, with every link followed.
fn find(
    directory: &Utf8Path,
    name: &FileName,
    what: &'static str,
) -> Result<(Utf8PathBuf, fs::Metadata), ImagesError> {
    let path = directory.join(name.as_str());
    let found = path.canonicalize_utf8().and_then(|resolved| Ok((fs::metadata(&resolved)?, resolved)));
    match found {
        Ok((metadata, resolved)) if metadata.is_file() => Ok((resolved, metadata)),
        Ok(_) => Err(ImagesError::Missing { what, path }),
        Err(source) if is_missing(&source) => Err(ImagesError::Missing { what, path }),
        Err(source) => Err(ImagesError::Read { path, source }),
    }
}

fn is_missing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GUEST: &str = r#"{"format":1,"id":"0011223344556677","kernel_version":"6.1.0-1","envd_version":"0.1.0",
        "kernel":"vmlinuz","initramfs":"initramfs.img"}"#;

    fn template(name: &str, aliases: &str) -> String {
        format!(
            r#"{{"format":1,"name":"{name}","aliases":[{aliases}],"default_user":"user","default_workdir":"/home/user",
            "image":"image.ext4","image_id":"8899aabbccddeeff","minimum_disk_mib":1024}}"#
        )
    }

    const MINIMAL: &str =
        r#"{"name":"minimal","default_user":"wrenn-user","default_workdir":"/home/wrenn-user"}"#;

    struct Fixture {
        _guard: tempfile::TempDir,
        at: Utf8PathBuf,
    }

    impl Fixture {
        fn new() -> Self {
            let guard = tempfile::tempdir().unwrap();
            let at = Utf8PathBuf::from_path_buf(guard.path().canonicalize().unwrap()).unwrap();
            let fixture = Self { _guard: guard, at };
            for (path, content) in [
                ("guest/manifest.json", GUEST),
                ("guest/vmlinuz", "kernel"),
                ("guest/initramfs.img", "initramfs"),
            ] {
                fixture.write(path, content);
            }
            fixture.template("base", MINIMAL);
            fixture
        }

        fn write(&self, path: &str, content: &str) {
            fs::create_dir_all(self.at.join(path).parent().unwrap()).unwrap();
            fs::write(self.at.join(path), content).unwrap();
        }

        fn template(&self, name: &str, aliases: &str) {
            self.write(&format!("templates/{name}/template.json"), &template(name, aliases));
            self.write(&format!("templates/{name}/image.ext4"), "image");
        }

        fn load(&self) -> Result<Images, ImagesError> {
            Images::load(&self.at)
        }
    }

    fn name(text: &str) -> TemplateName {
        text.parse().unwrap()
    }

    #[test]
    fn the_uncompressed_kernel_lies_beside_the_other_one() {
        let fixture = Fixture::new();
        let missing = fixture.load().unwrap().with_uncompressed_kernel();
        let told =
            matches!(&missing, Err(ImagesError::Missing { path, .. }) if path.ends_with("guest/vmlinux"));
        assert!(told, "{missing:?}");
        fixture.write("guest/vmlinux", "kernel");
        let images = fixture.load().unwrap();
        let other = images.clone().with_uncompressed_kernel().unwrap();
        assert_eq!(other.guest().bundle.kernel, fixture.at.join("guest/vmlinux"));
        let GuestBundle { id, initramfs, .. } = images.guest().bundle.clone();
        assert_eq!((&other.guest().bundle.id, &other.guest().bundle.initramfs), (&id, &initramfs));
    }

    #[test]
    fn a_template_answers_to_its_name_and_its_aliases() {
        let fixture = Fixture::new();
        let images = fixture.load().unwrap();
        assert_eq!(images.guest().bundle.id, "0011223344556677");
        assert_eq!(images.guest().bundle.kernel, fixture.at.join("guest/vmlinuz"));
        let base = images.resolve(&name("base")).unwrap();
        let minimal = images.resolve(&name("minimal")).unwrap();
        assert_eq!(base.template, minimal.template);
        assert_eq!((base.default_user.as_str(), base.default_workdir.as_str()), ("user", "/home/user"));
        assert_eq!(minimal.default_user.as_str(), "wrenn-user");
        assert_eq!(minimal.default_workdir.as_str(), "/home/wrenn-user");
        assert!(images.resolve(&name("other")).unwrap_err().is_unknown_template());
        assert_eq!(base.template.minimum_disk.get(), 1024);
        assert!(base.template.size_bytes > 0);
        assert_eq!(base.template.disk().path, fixture.at.join("templates/base/image.ext4"));
        assert_eq!(images.templates().count(), 1);
    }

    #[test]
    fn links_are_followed_when_it_is_loaded() {
        let fixture = Fixture::new();
        fs::rename(fixture.at.join("templates/base"), fixture.at.join("kept")).unwrap();
        std::os::unix::fs::symlink(fixture.at.join("kept"), fixture.at.join("templates/base")).unwrap();
        let images = fixture.load().unwrap();
        assert_eq!(images.templates().next().unwrap().image, fixture.at.join("kept/image.ext4"));
    }

    #[test]
    fn what_is_missing_is_named_with_what_builds_it() {
        for path in [
            "guest/manifest.json",
            "guest/vmlinuz",
            "guest/initramfs.img",
            "templates/base/template.json",
            "templates/base/image.ext4",
        ] {
            let fixture = Fixture::new();
            fs::remove_file(fixture.at.join(path)).unwrap();
            let error = fixture.load().unwrap_err();
            assert!(
                matches!(&error, ImagesError::Missing { path: at, .. } if at.ends_with(path)),
                "{error:?}"
            );
            assert!(error.to_string().contains("make images"), "{error}");
        }
        let fixture = Fixture::new();
        fs::remove_dir_all(fixture.at.join("templates")).unwrap();
        assert!(matches!(fixture.load(), Err(ImagesError::Missing { .. })));
        fs::create_dir(fixture.at.join("templates")).unwrap();
        assert!(matches!(fixture.load(), Err(ImagesError::NoTemplates { .. })));
        assert!(matches!(Images::load("/nowhere".into()), Err(ImagesError::Missing { .. })));
    }

    #[test]
    fn a_half_built_template_is_not_seen() {
        let fixture = Fixture::new();
        fixture.write("templates/.base.tmp/image.ext4", "half");
        assert_eq!(fixture.load().unwrap().templates().count(), 1);
    }

    #[test]
    fn a_directory_is_not_an_image() {
        let fixture = Fixture::new();
        fs::remove_file(fixture.at.join("guest/vmlinuz")).unwrap();
        fs::create_dir(fixture.at.join("guest/vmlinuz")).unwrap();
        assert!(matches!(fixture.load(), Err(ImagesError::Missing { .. })));
    }

    #[test]
    fn a_bad_manifest_is_named() {
        let fixture = Fixture::new();
        fixture.write("guest/manifest.json", &GUEST.replace("\"format\":1", "\"format\":2"));
        let error = fixture.load().unwrap_err();
        assert!(
            matches!(&error, ImagesError::Manifest { path, .. } if path.ends_with("guest/manifest.json"))
        );
    }

    #[test]
    fn no_two_templates_share_a_name() {
        let fixture = Fixture::new();
        fixture.template("other", MINIMAL);
        assert!(matches!(fixture.load(), Err(ImagesError::Ambiguous { .. })));
        fixture.template("other", &MINIMAL.replace("minimal", "base"));
        assert!(matches!(fixture.load(), Err(ImagesError::Ambiguous { .. })));
        fixture.template("other", &MINIMAL.replace("minimal", "other-too"));
        assert_eq!(fixture.load().unwrap().templates().count(), 2);
    }

    #[test]
    fn a_template_is_where_its_name_says() {
        let fixture = Fixture::new();
        fs::rename(fixture.at.join("templates/base"), fixture.at.join("templates/elsewhere")).unwrap();
        assert!(matches!(fixture.load(), Err(ImagesError::Misplaced { .. })));
    }

    #[test]
    fn an_image_fits_on_the_smallest_disk() {
        let fixture = Fixture::new();
        let image =
            fs::File::options().write(true).open(fixture.at.join("templates/base/image.ext4")).unwrap();
        image.set_len(1024 << 20).unwrap();
        fixture.load().unwrap();
        image.set_len((1024 << 20) + 4096).unwrap();
        assert!(matches!(fixture.load(), Err(ImagesError::ImageTooLarge { .. })));
    }
}
