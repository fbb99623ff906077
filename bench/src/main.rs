//! `make bench`: what a create costs over the bare minimum, and a few more numbers of the same stack.
//!
//! ```text
//!  a stack of its own ─► warm snapshot ─► floor and create, taking turns: in series, then several at once
//!                                      ─► exec ─► files ─► memory with 0 and with 10 sandboxes ─► RESULTS.md
//! ```
//!
//! Floor and create take turns so that a machine that becomes slower meanwhile is slower for both. Nothing
//! is warmed up, trimmed or tried again: what fails is counted, and then the program fails too.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command line program talks to people")]

mod product;
mod report;

use std::{num::NonZeroUsize, path::PathBuf, sync::Arc, time::Instant};

use anyhow::{Result, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use clap::Parser;
use tokio::task::JoinSet;
use wrenn_bench::{
    agent,
    floor::{self, Answered, Floor, Question},
    machine::Machine,
    memory::Memory,
    program::{publish, unless_interrupted, with_stack},
    statistics::Samples,
};
use wrenn_host_agent::{images::Images, network::Uplink};
use wrenn_testkit::{Client, Stack, stack};
use wrenn_types::{MemoryMib, Shape, Vcpus};

use crate::report::{Load, MemoryRow, Results};

/// How many floors, and then creates, are measured before it is the other's turn.
const TURN: usize = 10;

#[derive(Debug, Parser)]
#[command(name = "wrenn-bench", about = "Measure a stack of its own, into bench/RESULTS.md")]
struct Arguments {
    /// How many floors and how many creates in each of the two loads.
    #[arg(long, default_value_t = 100)]
    count: usize,
    /// How many at once.
    #[arg(long, default_value_t = NonZeroUsize::new(8).unwrap_or(NonZeroUsize::MIN))]
    at_once: NonZeroUsize,
    /// How many commands in one sandbox.
    #[arg(long, default_value_t = 200)]
    commands: usize,
    /// How many times a file is sent up and down.
    #[arg(long, default_value_t = 5)]
    files: usize,
    /// Size of the file in MiB.
    #[arg(long, default_value_t = 64)]
    file_mib: u32,
    /// Where the results go.
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/RESULTS.md"))]
    output: PathBuf,
}

#[tokio::main]
async fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let results = with_stack(async |stack| measure(&arguments, stack).await).await?;
    let failures: Vec<String> = results.failures().map(|(what, why)| format!("{what}: {why}")).collect();
    publish(&arguments.output, &results.markdown(), &results.ratio_lines(), &failures)
}

async fn measure(arguments: &Arguments, stack: &Stack) -> Result<Results> {
    let stacks = Processes::of(&stack.instance()?);
    let mut memory = vec![stacks.row("0 sandboxes, just started")?];

    eprintln!("making the warm snapshot, if it is not there");
    let shape = Shape { vcpus: Vcpus::default(), memory: MemoryMib::default() };
    let begin = Instant::now();
    let prepared = unless_interrupted(agent::prepare_template(&stacks.agent_socket, "base", shape)).await?;
    let first_snapshot = (!prepared.was_there).then(|| begin.elapsed());

    let images_directory = Utf8PathBuf::from_path_buf(stack::images()?)
        .map_err(|path| anyhow::anyhow!("{} is not UTF-8", path.display()))?;
    let images = Images::load(&images_directory)?;
    let vmm = floor::driver_of(&prepared.directory).await?;
    let uplink = Uplink::Named(stack.uplink().name().parse()?);
    let machine = Machine::here(
        format!("{} {}, {}", vmm.identity().name, vmm.identity().version, vmm.identity().machine),
        format!("{:?}", vmm.identity().accelerator).to_lowercase(),
        &prepared.directory,
    );
    let guest = images.guest().bundle.clone();
    let width = arguments.at_once.get();
    let floor = Arc::new(Floor::new(vmm, guest, &prepared.directory, uplink, width).await?);
    let loads = unless_interrupted(async {
        let series = in_series(arguments, &floor, stack.client()).await?;
        Ok((series, several_at_once(arguments, &floor, &stack.client()).await?))
    });
    let loads = loads.await;
    floor.close().await;
    let (series, at_once) = loads?;

    unless_interrupted(async {
        let mut client = stack.client();
        let exec = commands(arguments.commands, &mut client).await?;
        let (upload, download) = files(arguments, &mut client).await?;
        memory.extend(with_sandboxes(10, &stacks, &mut client).await?);
        Ok(Results {
            machine,
            date: jiff::Zoned::now().date().to_string(),
            series,
            at_once,
            width,
            exec,
            upload,
            download,
            file_mib: arguments.file_mib.into(),
            memory,
            first_snapshot,
        })
    })
    .await
}

async fn in_series(arguments: &Arguments, floor: &Floor, mut client: Client) -> Result<Load> {
    let mut load = Load::default();
    while load.floor.len() < arguments.count {
        let turn = TURN.min(arguments.count - load.floor.len());
        for question in [Question::FirstByte, Question::Command] {
            for _ in 0..turn {
                let ready = floor.prepare().await?;
                let answered = floor.restore(ready, question).await;
                load.of(question).add(answered.as_ref().map(|it| it.took));
                if let Ok(answered) = answered {
                    floor.finish(answered).await?;
                }
            }
        }
        while load.create.len() < load.floor.len() {
            let created = product::create_and_run(&mut client).await;
            load.create.add(created.as_ref().map(|it| it.to_first_result));
            if let Ok(created) = created {
                load.phases.add(created.phases);
                product::delete(&mut client, &created.id).await?;
            }
        }
        eprintln!("in series: {} of {}", load.floor.len(), arguments.count);
    }
    Ok(load)
}

async fn several_at_once(arguments: &Arguments, floor: &Arc<Floor>, client: &Client) -> Result<Load> {
    let (mut load, width) = (Load::default(), arguments.at_once.get());
    let mut clients = vec![client.clone(); width];
    while load.floor.len() < arguments.count {
        floors_at_once(width, floor, Question::FirstByte, &mut load).await?;
        floors_at_once(width, floor, Question::Command, &mut load).await?;
        clients = creates_at_once(clients, &mut load).await?;
        eprintln!("{width} at once: {} of {}", load.floor.len(), arguments.count);
    }
    Ok(load)
}

async fn floors_at_once(width: usize, floor: &Arc<Floor>, question: Question, load: &mut Load) -> Result<()> {
    let mut ready = Vec::with_capacity(width);
    for _ in 0..width {
        ready.push(floor.prepare().await?);
    }
    let mut tasks: JoinSet<Result<Answered>> = JoinSet::new();
    for ready in ready {
        let floor = Arc::clone(floor);
        tasks.spawn(async move { floor.restore(ready, question).await });
    }
    let mut all = Vec::with_capacity(width);
    for answered in tasks.join_all().await {
        load.of(question).add(answered.as_ref().map(|it| it.took));
        all.extend(answered.ok());
    }
    for answered in all {
        floor.finish(answered).await?;
    }
    Ok(())
}

/// Every client has its own connection, which is there before the clock starts.
async fn creates_at_once(clients: Vec<Client>, load: &mut Load) -> Result<Vec<Client>> {
    let mut connected = Vec::with_capacity(clients.len());
    for mut client in clients {
        client.get("/health").await?.expect(200)?;
        connected.push(client);
    }
    let mut tasks = JoinSet::new();
    for mut client in connected {
        tasks.spawn(async move { (product::create_and_run(&mut client).await, client) });
    }
    let mut clients = Vec::new();
    let mut deletions = JoinSet::new();
    for (created, mut client) in tasks.join_all().await {
        load.create.add(created.as_ref().map(|it| it.to_first_result));
        match created {
            Ok(created) => {
                load.phases.add(created.phases);
                deletions.spawn(async move {
                    let deleted = product::delete(&mut client, &created.id).await;
                    deleted.map(|()| client)
                });
            }
            Err(_) => clients.push(client),
        }
    }
    for deleted in deletions.join_all().await {
        clients.push(deleted?);
    }
    Ok(clients)
}

async fn commands(count: usize, client: &mut Client) -> Result<Samples> {
    eprintln!("{count} commands in one sandbox");
    let mut samples = Samples::default();
    let created = product::create_and_run(client).await?;
    for _ in 0..count {
        samples.add(product::run_true(client, &created.id).await);
    }
    product::delete(client, &created.id).await?;
    Ok(samples)
}

async fn files(arguments: &Arguments, client: &mut Client) -> Result<(Samples, Samples)> {
    eprintln!("a file of {} MiB up and down, {} times", arguments.file_mib, arguments.files);
    let (mut up, mut down) = (Samples::default(), Samples::default());
    let bytes = product::incompressible(usize::try_from(arguments.file_mib)? << 20);
    let created = product::create_and_run(client).await?;
    for _ in 0..arguments.files {
        let sent = product::send_file(client, &created.id, &bytes).await;
        let is_there = sent.is_ok();
        up.add(sent);
        if is_there {
            down.add(product::fetch_file(client, &created.id, &bytes).await);
        }
    }
    product::delete(client, &created.id).await?;
    Ok((up, down))
}

async fn with_sandboxes(count: usize, stacks: &Processes, client: &mut Client) -> Result<[MemoryRow; 2]> {
    eprintln!("memory with {count} sandboxes");
    let mut ids = Vec::with_capacity(count);
    for _ in 0..count {
        ids.push(product::create_and_run(client).await?.id);
    }
    let with = stacks.row(&format!("{count} sandboxes"))?;
    for id in &ids {
        product::delete(client, id).await?;
    }
    Ok([with, stacks.row("0 sandboxes, after all this")?])
}

/// The processes of the measured stack, and where its agent is.
#[derive(Debug)]
struct Processes {
    run_dir: Utf8PathBuf,
    agent_socket: Utf8PathBuf,
    machine_mark: String,
}

impl Processes {
    fn of(instance: &str) -> Self {
        let run_dir = Utf8Path::new("/run/wrenn").join(instance);
        let machine_mark = format!("guest=wrenn-{instance}-");
        Self { agent_socket: run_dir.join("agent.sock"), run_dir, machine_mark }
    }

    fn row(&self, when: &str) -> Result<MemoryRow> {
        let role = |role: &str| {
            Memory::of(|words| {
                words.get(1) == Some(&role)
                    && words.iter().any(|word| word.starts_with(self.run_dir.as_str()))
            })
        };
        let row = MemoryRow {
            when: when.to_owned(),
            control_plane: role("control-plane")?,
            agent: role("agent")?,
            machines: Memory::of(|words| words.iter().any(|word| word.starts_with(&self.machine_mark)))?,
        };
        ensure!(row.control_plane.processes == 1, "{} control planes run", row.control_plane.processes);
        ensure!(row.agent.processes == 1, "{} host agents run", row.agent.processes);
        Ok(row)
    }
}
