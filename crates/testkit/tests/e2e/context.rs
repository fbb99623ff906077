//! What a case is given: a stack and the few things that every case does with it.

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use wrenn_testkit::{Client, Stack};

/// How long a create may take on a machine that has other things to do.
const CREATE_BOUND: Duration = Duration::from_secs(180);
/// How often one that goes on is looked at.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// What a case becomes.
pub(crate) type Running = Pin<Box<dyn Future<Output = Result<()>> + Send>>;

/// A case on the shared stack.
pub(crate) struct Case {
    /// Its name, with the name of its file.
    pub(crate) name: &'static str,
    /// What it does.
    pub(crate) run: Box<dyn FnOnce(Arc<Context>) -> Running + Send>,
}

/// A case that has its own stack.
pub(crate) struct OwnCase {
    /// Its name, with the name of its file.
    pub(crate) name: &'static str,
    /// What it does.
    pub(crate) run: Box<dyn FnOnce() -> Running + Send>,
}

/// Names a case and boxes it.
pub(crate) fn case<F>(name: &'static str, run: impl FnOnce(Arc<Context>) -> F + Send + 'static) -> Case
where
    F: Future<Output = Result<()>> + Send + 'static,
{
    Case { name, run: Box::new(move |context| Box::pin(run(context))) }
}

/// Names a case that has its own stack and boxes it.
pub(crate) fn own_case<F>(name: &'static str, run: impl FnOnce() -> F + Send + 'static) -> OwnCase
where
    F: Future<Output = Result<()>> + Send + 'static,
{
    OwnCase { name, run: Box::new(move || Box::pin(run())) }
}

/// The shared stack. It is taken out once, at the end.
pub(crate) struct Context {
    stack: Mutex<Option<Arc<Stack>>>,
}

impl Context {
    /// The context of a running stack.
    pub(crate) fn new(stack: Stack) -> Self {
        Self { stack: Mutex::new(Some(Arc::new(stack))) }
    }

    /// The stack.
    pub(crate) fn stack(&self) -> Arc<Stack> {
        Arc::clone(self.stack.lock().unwrap().as_ref().expect("the stack runs until the last case is over"))
    }

    /// A new caller.
    pub(crate) fn client(&self) -> Client {
        self.stack().client()
    }

    /// Stops the stack.
    pub(crate) async fn stop(&self) -> Result<()> {
        let stack = self.stack.lock().unwrap().take().context("it is stopped once")?;
        Arc::into_inner(stack).context("a case still holds the stack")?.stop().await
    }
}

/// A sandbox of a case, by its id. A case that fails leaves it to the end of the stack.
pub(crate) struct Sandbox {
    /// Its id.
    pub(crate) id: String,
    /// A caller of its own.
    pub(crate) client: Client,
}

impl Sandbox {
    /// Creates one with the defaults.
    pub(crate) async fn create(client: Client) -> Result<Self> {
        Self::create_with(client, &json!({})).await
    }

    /// Creates one with this body.
    pub(crate) async fn create_with(mut client: Client, body: &Value) -> Result<Self> {
        let answer = client.post("/v1/sandboxes", body).await?;
        // On a machine that is busy the first of its shape may take longer than a caller is made to wait.
        let answer = if answer.status == 202 { answer } else { answer.expect(201)? };
        let id = answer.json()["id"].as_str().context("a sandbox has an id")?.to_owned();
        let mut sandbox = Self { id, client };
        let end = Instant::now() + CREATE_BOUND;
        let mut seen = answer.json();
        while seen["status"] == "starting" && Instant::now() < end {
            tokio::time::sleep(LOOK_AGAIN).await;
            let path = sandbox.path("");
            seen = sandbox.client.get(&path).await?.expect(200)?.json();
        }
        ensure!(seen["status"] == "running", "{seen}");
        Ok(sandbox)
    }

    /// A path below it.
    pub(crate) fn path(&self, rest: &str) -> String {
        format!("/v1/sandboxes/{}{rest}", self.id)
    }

    /// Runs a shell line and answers with the whole result.
    pub(crate) async fn shell(&mut self, line: &str) -> Result<Value> {
        self.exec(&json!({ "cmd": "/bin/sh", "args": ["-c", line] })).await
    }

    /// Runs a shell line that must end well and answers with its output.
    pub(crate) async fn output(&mut self, line: &str) -> Result<String> {
        let result = self.shell(line).await?;
        ensure!(result["exit_code"] == 0, "{line}: {result}");
        Ok(result["stdout"].as_str().unwrap_or_default().to_owned())
    }

    /// Runs what the body says.
    pub(crate) async fn exec(&mut self, body: &Value) -> Result<Value> {
        let path = self.path("/exec");
        Ok(self.client.post(&path, body).await?.expect(200)?.json())
    }

    /// Destroys it.
    pub(crate) async fn destroy(mut self) -> Result<()> {
        let path = self.path("");
        self.client.delete(&path).await?.expect(204)?;
        Ok(())
    }
}
