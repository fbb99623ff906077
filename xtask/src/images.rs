//! The images directory: links to the guest bundle and the templates in the user's cache.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use crate::{
    cache::{self, Cache},
    dependencies, guest_bundle, kernel, packages,
    repository::Repository,
    template,
};

/// Makes what is missing and gives the images directory.
pub(crate) fn make(repository: &Repository, refresh: bool) -> Result<PathBuf> {
    packages::install_missing(repository)?;
    let cache = Cache::open()?;
    dependencies::take(repository, &cache)?;
    // The kernel first: if the network is not there, that is known before anything is compiled.
    let kernel = kernel::find(repository, &cache, refresh)?;
    let images = repository.images();
    for name in template::names(repository)? {
        let template = template::make(repository, &cache, &name, refresh)?;
        link(&template, &images.join("templates").join(&name))?;
    }
    let envd = guest_bundle::build_envd(repository, &cache)?;
    let bundle = guest_bundle::make(&cache, &kernel, &envd)?;
    link(&bundle, &images.join("guest"))?;
    Ok(images)
}

/// Makes `place` a link to `target`, in one step if it was one to something else.
fn link(target: &Path, place: &Path) -> Result<()> {
    if fs::read_link(place).is_ok_and(|current| current == target) {
        return Ok(());
    }
    if let Some(parent) = place.parent() {
        fs::create_dir_all(parent).with_context(|| format!("making {}", parent.display()))?;
    }
    if place.is_dir() && !place.is_symlink() {
        cache::remove(place)?;
    }
    let temporary = place.with_extension(format!("{}.new", std::process::id()));
    symlink(target, &temporary)
        .and_then(|()| fs::rename(&temporary, place))
        .with_context(|| format!("linking {} to {}", place.display(), target.display()))
}
