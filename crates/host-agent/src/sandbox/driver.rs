//! The driver: the one task that owns a sandbox from its first file to its last.
//!
//! It runs the bring-up, then waits for the first of three things: the machine's end, a request, the
//! inactivity clock. The machine's end comes first when several are true at once, because a sandbox that
//! is gone must not be reported as destroyed by request. Whatever comes, it takes everything down and
//! publishes the end after nothing is left.

use std::{
    sync::{Arc, OnceLock},
    time::SystemTime,
};

use tokio::sync::{Notify, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use wrenn_types::EndReason;
use wrenn_vmm::ExitReason;

use super::{
    End, Handle, SandboxSpec, Shared, Stage, Status,
    activity::Activity,
    bring_up::{self, BringUpError, Host, Up},
    queue::RequestQueue,
};

/// Starts the driver of a new sandbox. `published` is called after every publication, by the driver.
pub fn start(
    host: Arc<Host>,
    spec: SandboxSpec,
    tracker: &TaskTracker,
    published: impl Fn(&Handle) + Send + Sync + 'static,
) -> Handle {
    let (sender, receiver) =
        watch::channel(Status { stage: Stage::Starting, started_at: None, phases: Vec::new(), end: None });
    let handle = Handle {
        inner: Arc::new(Shared {
            requests: std::sync::Mutex::new(RequestQueue::new(spec.generation)),
            spec,
            requested: Notify::new(),
            status: receiver,
            activity: Activity::new(),
            connector: OnceLock::new(),
            idle: std::sync::Mutex::new(None),
        }),
    };
    let driver = Driver { host, handle: handle.clone(), status: sender, published: Box::new(published) };
    tracker.spawn(driver.drive());
    handle
}

struct Driver {
    host: Arc<Host>,
    handle: Handle,
    status: watch::Sender<Status>,
    published: Box<dyn Fn(&Handle) + Send + Sync>,
}

impl Driver {
    fn publish(&self, change: impl FnOnce(&mut Status)) {
        self.status.send_modify(change);
        (self.published)(&self.handle);
    }

    async fn drive(self) {
        (self.published)(&self.handle);
        let end = match self.bring_up().await {
            Ok(up) => self.run(up).await,
            Err(error) => self.failed(error),
        };
        let id = &self.handle.spec().id;
        tracing::info!(%id, reason = ?end.reason, message = end.message, "sandbox stopped");
        self.publish(|status| {
            status.stage = Stage::Stopped;
            status.end = Some(end);
        });
    }

    async fn bring_up(&self) -> Result<Up, BringUpError> {
        let cancel = CancellationToken::new();
        let cancelled_by = Arc::new(OnceLock::new());
        let bring_up = bring_up::bring_up(
            Arc::clone(&self.host),
            self.handle.spec().clone(),
            cancel.clone(),
            Arc::clone(&cancelled_by),
        );
        tokio::pin!(bring_up);
        loop {
            tokio::select! {
                biased;
                outcome = &mut bring_up => return outcome,
                reason = self.next_request(), if !cancel.is_cancelled() => {
                    // Set before the cancellation, so that whoever sees the one finds the other.
                    let _ = cancelled_by.set(reason);
                    cancel.cancel();
                }
            }
        }
    }

    /// The next request. Cancel-safe: a request is taken out only when it is answered.
    async fn next_request(&self) -> EndReason {
        loop {
            // `notify_one` keeps a permit when nobody waits, so a request put between the look and the
            // wait is not lost.
            let taken =
                self.handle.inner.requests.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
            if let Some(reason) = taken {
                return reason;
            }
            self.handle.inner.requested.notified().await;
        }
    }

    async fn run(&self, mut up: Up) -> End {
        let shared = &self.handle.inner;
        let _ = shared.connector.set(up.connector());
        shared.set_idle(up.take_idle_connection());
        shared.activity.touch();
        self.publish(|status| {
            status.stage = Stage::Running;
            status.started_at = Some(SystemTime::now());
            status.phases = up.phases().to_vec();
        });
        let id = &self.handle.spec().id;
        tracing::info!(%id, phases = ?PhaseList(up.phases()), "sandbox running");

        let mut exit = up.exit();
        let end = tokio::select! {
            biased;
            reason = bring_up::gone(&mut exit) => exited(&reason),
            reason = self.next_request() => End { reason, message: reason.to_string(), error: None },
            () = shared.activity.expired(self.handle.spec().timeout.duration()) => {
                let reason = EndReason::Inactivity;
                End { reason, message: reason.to_string(), error: None }
            }
        };
        shared.requests.lock().unwrap_or_else(std::sync::PoisonError::into_inner).ended();
        self.publish(|status| {
            status.stage = Stage::Stopping;
            status.end = Some(end.clone());
        });
        // A socket that is left keeps the namespace that it was made in.
        shared.set_idle(None);
        up.tear_down().await;
        end
    }

    fn failed(&self, error: BringUpError) -> End {
        self.handle.inner.requests.lock().unwrap_or_else(std::sync::PoisonError::into_inner).ended();
        if let BringUpError::Cancelled(reason) = error {
            return End { reason, message: reason.to_string(), error: None };
        }
        let id = &self.handle.spec().id;
        tracing::warn!(%id, error = &error as &dyn std::error::Error, "sandbox did not come up");
        let message = chain(&error);
        End { reason: EndReason::StartFailed, message, error: Some(Arc::new(error)) }
    }
}

/// An error and its sources as one sentence.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        source = inner.source();
    }
    text
}

fn exited(reason: &ExitReason) -> End {
    let (word, message) = match reason {
        ExitReason::GuestShutdown => (EndReason::GuestShutdown, EndReason::GuestShutdown.to_string()),
        ExitReason::GuestPanic => (EndReason::GuestPanic, EndReason::GuestPanic.to_string()),
        ExitReason::VmmFailed { code, stderr } => {
            (EndReason::VmmCrash, format!("the virtual machine monitor ended with code {code}: {stderr}"))
        }
        ExitReason::VmmKilled { signal } => {
            (EndReason::VmmCrash, format!("the virtual machine monitor was killed by signal {signal}"))
        }
        ExitReason::Stopped => (EndReason::VmmCrash, "the virtual machine monitor was stopped".to_owned()),
    };
    End { reason: word, message, error: None }
}

/// Phases as `name=1.2ms`.
struct PhaseList<'a>(&'a [super::Phase]);

impl std::fmt::Debug for PhaseList<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (index, phase) in self.0.iter().enumerate() {
            let space = if index == 0 { "" } else { " " };
            let micros = phase.duration_micros;
            write!(f, "{space}{}={}.{}ms", phase.name, micros / 1000, micros % 1000 / 100)?;
        }
        Ok(())
    }
}
