//! The fake passes what every driver passes, so that it cannot lie.
#![allow(clippy::unwrap_used)]

use camino::{Utf8Path, Utf8PathBuf};
use wrenn_vmm::{
    ExitReason, GuestBundle, Vm, Vmm,
    conformance::{self, Subject},
    fake::Fake,
};

struct Fakes {
    fake: Fake,
    root: Utf8PathBuf,
    _directory: tempfile::TempDir,
}

#[async_trait::async_trait]
impl Subject for Fakes {
    fn vmm(&self) -> &dyn Vmm {
        &self.fake
    }

    fn guest(&self) -> GuestBundle {
        GuestBundle {
            id: "counting".to_owned(),
            kernel: self.root.join("kernel"),
            initramfs: self.root.join("initramfs"),
        }
    }

    fn directory(&self) -> &Utf8Path {
        &self.root
    }

    async fn kill(&self, _vm: &dyn Vm, name: &str) {
        self.kill_by_name(name).await;
    }

    async fn kill_by_name(&self, name: &str) {
        assert!(self.fake.end(name, ExitReason::VmmKilled { signal: 9 }));
    }
}

#[tokio::test]
async fn conforms() {
    let directory = tempfile::tempdir().unwrap();
    let root = Utf8PathBuf::from_path_buf(directory.path().to_owned()).unwrap();
    let fakes = Fakes { fake: Fake::new(), root, _directory: directory };
    std::fs::write(fakes.guest().kernel, "").unwrap();
    std::fs::write(fakes.guest().initramfs, "").unwrap();
    conformance::run(&fakes).await;
    assert!(fakes.fake.machines().is_empty());
}
