//! The Firecracker driver with real machines. Without Firecracker, KVM, a guest kernel or busybox it says what it skipped.
#![allow(clippy::print_stderr, clippy::unwrap_used)]

mod support;

use camino::{Utf8Path, Utf8PathBuf};
use tokio::sync::Mutex;
use wrenn_host_linux::process::{Process, find_by_argument};
use wrenn_vmm::{
    GuestBundle, Vm, Vmm,
    conformance::{self, Subject},
    firecracker::{Firecracker, FirecrackerOptions},
};

/// One test at a time: each has several machines, and some count processes and files.
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

struct Host {
    firecracker: Firecracker,
    guest: GuestBundle,
    root: Utf8PathBuf,
    _directory: tempfile::TempDir,
}

impl Host {
    async fn new() -> Option<Self> {
        let firecracker = match Firecracker::detect(FirecrackerOptions::from_environment()).await {
            Ok(firecracker) => firecracker,
            Err(error) => {
                support::skipped(&error.to_string());
                return None;
            }
        };
        let directory = tempfile::tempdir().unwrap();
        let root = Utf8PathBuf::from_path_buf(directory.path().to_owned()).unwrap();
        match support::counting_guest(&root, support::Kernel::Uncompressed) {
            Ok(guest) => Some(Self { firecracker, guest, root, _directory: directory }),
            Err(why) => {
                support::skipped(&why);
                None
            }
        }
    }
}

#[async_trait::async_trait]
impl Subject for Host {
    fn vmm(&self) -> &dyn Vmm {
        &self.firecracker
    }

    fn guest(&self) -> GuestBundle {
        self.guest.clone()
    }

    fn directory(&self) -> &Utf8Path {
        &self.root
    }

    async fn kill(&self, vm: &dyn Vm, _name: &str) {
        Process::open(vm.pid().unwrap()).unwrap().kill_and_wait().await.unwrap();
    }

    async fn kill_by_name(&self, name: &str) {
        let mark = format!("guest={name}");
        let found = find_by_argument(&mark).unwrap().into_iter().find(|found| found.argument == mark);
        found.unwrap().process.kill_and_wait().await.unwrap();
    }
}

#[tokio::test]
async fn conforms() {
    let _alone = ONE_AT_A_TIME.lock().await;
    let Some(host) = Host::new().await else { return };
    conformance::run(&host).await;
}
