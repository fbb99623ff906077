//! Files, up and down.

use std::sync::Arc;

use anyhow::{Result, ensure};
use serde_json::json;
use sha2::{Digest as _, Sha256};

use crate::context::{Case, Context, Sandbox, case};

/// The cases of this file.
pub(crate) fn cases() -> Vec<Case> {
    vec![
        case("files::sixty_four_mebibytes_up_and_down", large),
        case("files::whoever_is_asked_owns_what_is_written", owner),
        case("files::list_stat_make_move_remove", tree),
        case("files::a_directory_or_a_missing_file_is_named", wrong_kind),
        case("files::a_full_disk_says_so_and_keeps_nothing_half_written", full_disk),
        case("files::the_kernels_files_can_be_read", kernel_files),
        case("files::forms_of_the_older_routes", older_routes),
    ]
}

/// Bytes that no compression helps with and no mistake repeats.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

async fn large(context: Arc<Context>) -> Result<()> {
    let mut sandbox = Sandbox::create(context.client()).await?;
    let bytes = noise(64 << 20);
    let digest: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    let path = sandbox.path("/files?path=/home/user/deep/er/large");
    let answer = sandbox.client.put(&path, bytes.clone()).await?;
    ensure!(answer.status.is_success(), "{}", answer.text());
    let said = sandbox.output("sha256sum /home/user/deep/er/large").await?;
    ensure!(said.starts_with(&digest), "{said} against {digest}");
    let down = sandbox.client.get(&path).await?.expect(200)?;
    ensure!(down.body.len() == bytes.len() && down.body == bytes, "{} bytes came back", down.body.len());
    sandbox.destroy().await
}

async fn owner(context: Arc<Context>) -> Result<()> {
    let mut sandbox = Sandbox::create(context.client()).await?;
    let path = sandbox.path("/files?path=notes/today.txt");
    sandbox.client.put(&path, "hello").await?;
    let said = sandbox.output("stat -c '%U:%G %a %s' /home/user/notes /home/user/notes/today.txt").await?;
    let lines: Vec<_> = said.lines().collect();
    ensure!(lines[0].starts_with("user:user 755") && lines[1] == "user:user 644 5", "{said}");
    sandbox.destroy().await
}

async fn tree(context: Arc<Context>) -> Result<()> {
    let mut sandbox = Sandbox::create(context.client()).await?;
    let (make, list, remove) =
        (sandbox.path("/files/mkdir"), sandbox.path("/files/list"), sandbox.path("/files/remove"));
    let made = sandbox.client.post(&make, &json!({ "path": "/home/user/a/b" })).await?.expect(200)?.json();
    ensure!(made["entry"]["type"] == "directory", "{made}");
    sandbox.client.post(&make, &json!({ "path": "/home/user/a/b" })).await?.expect(409)?;
    let put = sandbox.path("/files?path=/home/user/a/b/c.txt");
    sandbox.client.put(&put, "12345").await?;
    sandbox.output("ln -s c.txt /home/user/a/b/link").await?;
    let body = json!({ "path": "/home/user/a", "depth": 2 });
    let listed = sandbox.client.post(&list, &body).await?.expect(200)?.json();
    let names: Vec<_> =
        listed["entries"].as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap()).collect();
    ensure!(names == ["b", "c.txt", "link"], "{listed}");
    let file = &listed["entries"][1];
    ensure!(file["size"] == 5 && file["type"] == "file" && file["owner"] == "user", "{file}");
    sandbox.client.post(&remove, &json!({ "path": "/home/user/a" })).await?.expect(204)?;
    sandbox.client.post(&list, &json!({ "path": "/home/user/a" })).await?.expect(404)?;
    sandbox.destroy().await
}

async fn wrong_kind(context: Arc<Context>) -> Result<()> {
    let mut sandbox = Sandbox::create(context.client()).await?;
    for (path, status, code) in [
        ("/files?path=/no/such/file", 404, "not_found"),
        ("/files?path=/etc", 400, "invalid_request"),
        ("/files?path=", 400, "invalid_request"),
        ("/files", 400, "invalid_request"),
    ] {
        let answer = sandbox.client.get(&sandbox.path(path)).await?;
        ensure!(answer.status.as_u16() == status, "{path}: {} {}", answer.status, answer.text());
        ensure!(answer.error_code() == code, "{path}: {}", answer.text());
    }
    let onto_directory = sandbox.path("/files?path=/etc");
    let answer = sandbox.client.put(&onto_directory, "x").await?;
    ensure!(answer.status.as_u16() == 400, "{} {}", answer.status, answer.text());
    sandbox.destroy().await
}

async fn full_disk(context: Arc<Context>) -> Result<()> {
    let mut sandbox = Sandbox::create(context.client()).await?;
    let mount = "sudo mkdir -p /small && sudo mount -t tmpfs -o size=1m,mode=777 small /small";
    sandbox.output(mount).await?;
    let path = sandbox.path("/files?path=/small/large");
    let answer = sandbox.client.put(&path, noise(4 << 20)).await?;
    ensure!(answer.status.as_u16() == 507, "{} {}", answer.status, answer.text());
    ensure!(sandbox.output("ls /small").await?.is_empty(), "nothing half-written is left");
    sandbox.destroy().await
}

async fn kernel_files(context: Arc<Context>) -> Result<()> {
    let mut sandbox = Sandbox::create(context.client()).await?;
    let path = sandbox.path("/files?path=/proc/sys/kernel/random/boot_id");
    let read = sandbox.client.get(&path).await?.expect(200)?.text();
    ensure!(read.trim().len() == 36, "{read}");
    sandbox.destroy().await
}

async fn older_routes(context: Arc<Context>) -> Result<()> {
    let mut sandbox = Sandbox::create(context.client()).await?;
    let boundary = "----wrenn-test";
    for (route, name) in [("/files/write", "one.txt"), ("/files/stream/write", "two.txt")] {
        let body = format!(
            "--{boundary}\r\nContent-Disposition: form-data; name=\"path\"\r\n\r\n/home/user/{name}\r\n\
             --{boundary}\r\nContent-Disposition: form-data; name=\"file\"; filename=\"upload\"\r\n\
             Content-Type: application/octet-stream\r\n\r\ncontent of {name}\r\n--{boundary}--\r\n"
        );
        let kind = format!("multipart/form-data; boundary={boundary}");
        let path = sandbox.path(route);
        sandbox
            .client
            .send(http::Method::POST, &path, &[("content-type", kind.as_str())], body)
            .await?
            .expect(204)?;
        for route in ["/files/read", "/files/stream/read"] {
            let path = sandbox.path(route);
            let body = json!({ "path": format!("/home/user/{name}") });
            let read = sandbox.client.post(&path, &body).await?.expect(200)?.text();
            ensure!(read == format!("content of {name}"), "{route}: {read}");
        }
    }
    sandbox.destroy().await
}
