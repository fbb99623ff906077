//! Stand-in while the driver is written.
#![allow(missing_docs, clippy::all)]
use crate::*;
use async_trait::async_trait;
use serde_json::{Value, json};
use std::{
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    net::UnixStream,
    sync::watch,
};
use wrenn_host_linux::process::{Child, Spawn};

#[derive(Debug)]
pub struct Quick {
    identity: VmmIdentity,
    khz: u64,
}
impl Quick {
    pub fn new() -> Self {
        let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let mhz: f64 = info
            .lines()
            .find(|l| l.starts_with("cpu MHz"))
            .and_then(|l| l.split(':').nth(1))
            .and_then(|t| t.trim().parse().ok())
            .unwrap_or(2000.0);
        Self {
            khz: (mhz * 1000.0) as u64,
            identity: VmmIdentity {
                name: "qemu".into(),
                version: "7.2".into(),
                machine: "microvm".into(),
                cpu_model: "max".into(),
                accelerator: Accelerator::Tcg,
            },
        }
    }
    fn start(
        &self,
        spec: MachineSpec,
        mem: &camino::Utf8Path,
        share: bool,
        incoming: bool,
    ) -> VmmResult<QuickVm> {
        let mib = spec.shape.memory.get();
        let mut a: Vec<String> = vec![
            "-name".into(),
            format!("guest={}", spec.name),
            "-M".into(),
            "microvm,pit=on,pic=on,rtc=on,acpi=on,memory-backend=m".into(),
            "-accel".into(),
            "tcg,tb-size=64".into(),
            "-cpu".into(),
            "max".into(),
            "-object".into(),
            format!(
                "memory-backend-file,id=m,size={mib}M,mem-path={mem},share={}",
                if share { "on" } else { "off" }
            ),
            "-m".into(),
            mib.to_string(),
            "-smp".into(),
            spec.shape.vcpus.get().to_string(),
            "-nodefaults".into(),
            "-no-user-config".into(),
            "-nographic".into(),
            "-no-reboot".into(),
            "-serial".into(),
            format!("file:{}/console.log", spec.run_dir),
            "-qmp".into(),
            format!("unix:{}/qmp,server=on,wait=off", spec.run_dir),
            "-kernel".into(),
            spec.guest.kernel.to_string(),
            "-initrd".into(),
            spec.guest.initramfs.to_string(),
            "-append".into(),
            format!("console=ttyS0 quiet panic=-1 tsc=reliable tsc_early_khz={}", self.khz),
        ];
        if incoming {
            a.extend(["-incoming".into(), "defer".into(), "-S".into()]);
        }
        if let Some(d) = &spec.disk {
            a.extend([
                "-drive".into(),
                format!(
                    "if=none,id=d,file={},format={},discard=unmap",
                    d.path,
                    if d.format == DiskFormat::Raw { "raw" } else { "qcow2" }
                ),
                "-device".into(),
                "virtio-blk-device,drive=d".into(),
            ]);
        }
        let mut s = Spawn::new("/usr/bin/qemu-system-x86_64").new_session();
        if let Some(n) = &spec.network {
            s = s.network_namespace(n.namespace.as_std_path());
            a.extend([
                "-netdev".into(),
                format!("tap,id=n,ifname={},script=no,downscript=no", n.tap),
                "-device".into(),
                "virtio-net-device,netdev=n,mac=02:fc:00:00:00:05".into(),
            ]);
        }
        for k in spec.keep_open {
            s = s.keep_open(k);
        }
        let err = std::fs::File::create(spec.run_dir.join("stderr")).unwrap();
        let child = s
            .args(a)
            .stderr(err)
            .start()
            .map_err(|e| VmmError::Spawn { program: "qemu".into(), source: std::io::Error::other(e) })?;
        let pid = child.pid();
        let (tx, rx) = watch::channel(None);
        tokio::spawn(async move {
            let mut child: Child = child;
            let r = child.wait().await;
            let _ = tx.send(Some(match r {
                Ok(e) if e.success() => ExitReason::GuestShutdown,
                other => ExitReason::VmmFailed { code: 1, stderr: format!("{other:?}") },
            }));
        });
        Ok(QuickVm { pid, rx, run_dir: spec.run_dir, q: None })
    }
}
#[derive(Debug)]
struct QuickVm {
    pid: u32,
    rx: watch::Receiver<Option<ExitReason>>,
    run_dir: camino::Utf8PathBuf,
    q: Option<BufReader<UnixStream>>,
}
fn conn(e: std::io::Error) -> VmmError {
    VmmError::Connection { command: "qmp".into(), source: e }
}
impl QuickVm {
    async fn open(&mut self) -> VmmResult<()> {
        let p = self.run_dir.join("qmp");
        let s = loop {
            match UnixStream::connect(&p).await {
                Ok(s) => break s,
                Err(_) if self.rx.borrow().is_none() => tokio::time::sleep(Duration::from_millis(1)).await,
                Err(e) => return Err(conn(e)),
            }
        };
        let mut b = BufReader::new(s);
        let mut l = String::new();
        b.read_line(&mut l).await.map_err(conn)?;
        self.q = Some(b);
        self.cmd("qmp_capabilities", None, None).await?;
        Ok(())
    }
    async fn cmd(&mut self, c: &str, args: Option<Value>, fd: Option<&OwnedFd>) -> VmmResult<Value> {
        let b = self.q.as_mut().unwrap();
        let mut m = json!({"execute": c});
        if let Some(a) = args {
            m["arguments"] = a;
        }
        let t = format!("{m}\n");
        let s = b.get_ref().as_fd();
        use std::io::IoSlice;
        use std::os::fd::AsRawFd;
        let fds = fd.map(|f| [f.as_raw_fd()]);
        let cm = fds.as_ref().map(|f| nix::sys::socket::ControlMessage::ScmRights(f));
        nix::sys::socket::sendmsg::<()>(
            s.as_raw_fd(),
            &[IoSlice::new(t.as_bytes())],
            cm.as_slice(),
            nix::sys::socket::MsgFlags::empty(),
            None,
        )
        .map_err(|e| conn(e.into()))?;
        loop {
            let mut l = String::new();
            if b.read_line(&mut l).await.map_err(conn)? == 0 {
                return Err(conn(std::io::ErrorKind::UnexpectedEof.into()));
            }
            let v: Value = serde_json::from_str(&l).unwrap_or_default();
            if v.get("error").is_some() {
                return Err(VmmError::Refused { command: c.into(), message: v["error"].to_string() });
            }
            if let Some(r) = v.get("return") {
                return Ok(r.clone());
            }
        }
    }
    async fn share(&mut self) -> VmmResult<()> {
        self.cmd(
            "migrate-set-capabilities",
            Some(json!({"capabilities":[{"capability":"x-ignore-shared","state":true}]})),
            None,
        )
        .await
        .map(drop)
    }
}
#[async_trait]
impl Vmm for Quick {
    fn identity(&self) -> &VmmIdentity {
        &self.identity
    }
    fn capabilities(&self) -> Capabilities {
        Capabilities { supports_uffd: false, supports_diff: false }
    }
    async fn boot(&self, spec: MachineSpec, m: Option<&camino::Utf8Path>) -> VmmResult<Box<dyn Vm>> {
        let m = m.unwrap().to_owned();
        let mut v = self.start(spec, &m, true, false)?;
        v.open().await?;
        Ok(Box::new(v))
    }
    async fn restore(&self, spec: MachineSpec, from: &SnapshotFiles) -> VmmResult<Box<dyn Vm>> {
        let mut v = self.start(spec, &from.memory, false, true)?;
        v.open().await?;
        v.share().await?;
        let f: OwnedFd = std::fs::File::open(&from.state).map_err(conn)?.into();
        v.cmd("getfd", Some(json!({"fdname":"s"})), Some(&f)).await?;
        v.cmd("migrate-incoming", Some(json!({"uri":"fd:s"})), None).await?;
        while v.cmd("query-status", None, None).await?["status"] != "paused" {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok(Box::new(v))
    }
}
#[async_trait]
impl Vm for QuickVm {
    fn pid(&self) -> Option<u32> {
        Some(self.pid)
    }
    async fn pause(&mut self) -> VmmResult<()> {
        self.cmd("stop", None, None).await.map(drop)
    }
    async fn resume(&mut self) -> VmmResult<()> {
        self.cmd("cont", None, None).await.map(drop)
    }
    async fn snapshot(&mut self, into: &SnapshotFiles) -> VmmResult<()> {
        self.share().await?;
        let f: OwnedFd = std::fs::File::create(&into.state).map_err(conn)?.into();
        self.cmd("getfd", Some(json!({"fdname":"o"})), Some(&f)).await?;
        self.cmd("migrate", Some(json!({"uri":"fd:o"})), None).await?;
        loop {
            let s = self.cmd("query-migrate", None, None).await?;
            if s["status"] == "completed" {
                return Ok(());
            }
            if s["status"] == "failed" {
                return Err(VmmError::Refused { command: "migrate".into(), message: s.to_string() });
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    async fn resize_disk(&mut self, bytes: u64) -> VmmResult<()> {
        self.cmd("block_resize", Some(json!({"device":"d","size":bytes})), None).await.map(drop)
    }
    async fn console(&mut self) -> String {
        std::fs::read_to_string(self.run_dir.join("console.log")).unwrap_or_default()
    }
    fn exit(&self) -> watch::Receiver<Option<ExitReason>> {
        self.rx.clone()
    }
    async fn stop(&mut self) -> VmmResult<ExitReason> {
        let _ = nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(self.pid as i32),
            nix::sys::signal::Signal::SIGKILL,
        );
        let _ = self.rx.wait_for(Option::is_some).await;
        Ok(ExitReason::Stopped)
    }
}
