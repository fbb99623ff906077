//! Clones of one snapshot are not each other.

use std::{collections::BTreeSet, sync::Arc, time::SystemTime};

use anyhow::{Result, ensure};

use crate::context::{Case, Context, Sandbox, case};

/// The cases of this file.
pub(crate) fn cases() -> Vec<Case> {
    vec![
        case("identity::clones_share_nothing_that_must_differ", clones_differ),
        case("identity::the_clock_is_the_hosts", clock),
    ]
}

async fn clones_differ(context: Arc<Context>) -> Result<()> {
    let questions = [
        "head -c 16 /dev/urandom | od -An -tx1",
        "cat /proc/sys/kernel/random/uuid",
        "cat /etc/machine-id",
        "hostname",
        "python3 -c 'import random, secrets; print(random.random(), secrets.token_hex(8))'",
    ];
    let mut answers: Vec<BTreeSet<String>> = vec![BTreeSet::new(); questions.len()];
    let mut made = Vec::new();
    for _ in 0..3 {
        made.push(Sandbox::create(context.client()).await?);
    }
    for sandbox in &mut made {
        for (question, answers) in questions.iter().zip(&mut answers) {
            let said = sandbox.output(question).await?;
            ensure!(!said.trim().is_empty(), "{question} says nothing");
            ensure!(answers.insert(said.clone()), "two clones say {said:?} to {question}");
        }
    }
    for sandbox in made {
        let id = sandbox.id.clone();
        ensure!(answers[3].contains(&format!("{id}\n")), "the hostname is the id");
        sandbox.destroy().await?;
    }
    Ok(())
}

async fn clock(context: Arc<Context>) -> Result<()> {
    let mut sandbox = Sandbox::create(context.client()).await?;
    let seconds = |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs_f64();
    let before = seconds(SystemTime::now());
    let guest: f64 = sandbox.output("date +%s.%N").await?.trim().parse()?;
    let after = seconds(SystemTime::now());
    // The guest's moment lies within the exchange; 50 ms is what the first command may find the clock wrong by.
    ensure!(before - 0.05 < guest && guest < after + 0.05, "{before} < {guest} < {after}");
    sandbox.destroy().await
}
