//! The kernel modules of the initramfs.

use std::{fs, io};

use rustix::{io::Errno, system::finit_module};

use crate::console::say;

const DIRECTORY: &str = "/modules";
/// The kernel unpacks the module itself (`MODULE_INIT_COMPRESSED_FILE`).
const COMPRESSED: i32 = 4;

/// Why the modules were not loaded.
#[derive(Debug, thiserror::Error)]
pub(super) enum ModulesError {
    #[error("cannot read {DIRECTORY}/order")]
    Order(#[source] io::Error),
}

/// Loads the modules that `/modules/order` names, one a line, in its order. One that cannot be loaded is reported and
/// passed over: what depends on it will say so in its turn.
pub(super) fn load_all() -> Result<(), ModulesError> {
    let order = match fs::read_to_string(format!("{DIRECTORY}/order")) {
        Ok(order) => order,
        // A kernel that has everything built in.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(ModulesError::Order(error)),
    };
    for name in names(&order) {
        if let Err(error) = load(name) {
            say(format_args!("cannot load the module {name}: {error}"));
        }
    }
    Ok(())
}

fn names(order: &str) -> impl Iterator<Item = &str> {
    order.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'))
}

fn load(name: &str) -> io::Result<()> {
    let file = fs::File::open(format!("{DIRECTORY}/{name}"))?;
    let flags = if name.ends_with(".ko") { 0 } else { COMPRESSED };
    match finit_module(&file, c"", flags) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_has_one_name_a_line() {
        let order = "# first\nvirtio_ring.ko\n\n  virtio.ko \n";
        assert_eq!(names(order).collect::<Vec<_>>(), ["virtio_ring.ko", "virtio.ko"]);
    }
}
