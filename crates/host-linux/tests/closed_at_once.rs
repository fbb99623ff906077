//! What a closed descriptor lets go of, at once. A child that another thread forks has copies of all
//! descriptors until it executes its program, and holds what they hold for that long: these tests are a
//! program of their own, in which nothing is forked.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(clippy::print_stdout, reason = "a skipped test says so")]

use std::{fs, io, path::PathBuf};

use wrenn_host_linux::{
    lock::FileLock,
    netns::{self, NetworkNamespace},
    tap,
};

#[tokio::test]
async fn a_persistent_device_stays_and_takes_one_at_a_time() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: TAP devices need root");
        return;
    }
    let path = PathBuf::from(format!("/run/netns/wrenn-unit-tap-{}", std::process::id()));
    netns::prepare_names().unwrap();
    let (namespace, ()) =
        NetworkNamespace::create(&path, || tap::create_persistent("tap0", None)).await.unwrap();
    netns::remove_name(&path).unwrap();
    namespace
        .run(|| {
            assert_eq!(tap::create_persistent("tap0", None).unwrap_err().kind(), io::ErrorKind::ResourceBusy);
            let first = tap::attach("tap0").unwrap();
            assert_eq!(tap::attach("tap0").unwrap_err().kind(), io::ErrorKind::ResourceBusy);
            drop(first);
            tap::attach("tap0").unwrap();
        })
        .await
        .unwrap();
}

#[test]
fn a_lock_is_held_until_its_last_descriptor_is_closed() {
    let path = std::env::temp_dir().join(format!("wrenn-unit-lock-shared-{}", std::process::id()));
    let mut lock = FileLock::try_acquire(&path).unwrap().unwrap();
    lock.write("a longer text").unwrap();
    lock.write("owner").unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), "owner");
    let shared = lock.share().unwrap();
    drop(lock);
    assert!(FileLock::try_acquire(&path).unwrap().is_none());
    drop(shared);
    let again = FileLock::try_acquire(&path).unwrap().unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), "owner", "who had it is still to be read");
    again.remove().unwrap();
    assert!(!path.exists());
}
