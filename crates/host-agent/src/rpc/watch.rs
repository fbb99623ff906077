//! The stream of what happens on this host. Whoever holds it open is a session of a control plane.
//!
//! ```text
//!  the last loss of the control plane, if any ─► every sandbox ─► in sync ─► each change, each loss
//! ```

use std::sync::Arc;

use connectrpc::ConnectError;
use futures::{Stream, StreamExt as _};
use tokio::sync::broadcast::error::RecvError;
use wrenn_proto::hostagent::v1 as wire;

use super::{millis, sandbox, unreadable};
use crate::{
    config::OnControlPlaneLoss,
    control_plane_loss::{Report, Sessions},
    registry::Registry,
    sandbox::Handle,
};

type Message = Result<wire::WatchSandboxesResponse, ConnectError>;

fn message(event: impl Into<wire::watch_sandboxes_response::Event>) -> Message {
    Ok(wire::WatchSandboxesResponse { event: Some(event.into()), ..Default::default() })
}

fn changed(handle: &Handle) -> Message {
    message(sandbox(handle, &handle.status()))
}

fn loss(report: &Report) -> Message {
    let failed = report.failed.iter().map(|(id, why)| wire::control_plane_loss::Failed {
        sandbox_id: id.to_string(),
        message: why.clone(),
        ..Default::default()
    });
    message(wire::ControlPlaneLoss {
        away_since_ms: millis(report.away_since),
        lost_at_ms: millis(report.lost_at),
        pause: report.policy == OnControlPlaneLoss::Pause,
        running: u32::try_from(report.running).unwrap_or(u32::MAX),
        paused: report.paused.iter().map(ToString::to_string).collect(),
        failed: failed.collect(),
        ..Default::default()
    })
}

/// Everything there is, and then what happens, for as long as both sides want.
pub(super) fn events(
    registry: Arc<Registry>,
    sessions: &Sessions,
) -> impl Stream<Item = Message> + Send + use<> {
    let session = sessions.open();
    // Subscribed before the first look, so that nothing falls between the two.
    let (events, mut reports) = (registry.events(), sessions.reports());
    let lost = reports.borrow_and_update().clone();
    let first = lost.map(|report| loss(&report)).into_iter();
    let known = registry.all();
    let known = known.into_iter().map(|handle| changed(&handle));
    let in_sync = message(wire::watch_sandboxes_response::InSync::default());
    // Those do not change before another agent looks at them.
    let left = registry.unreadable().into_iter().map(|(id, why)| message(unreadable(&id, &why)));
    let first = futures::stream::iter(first.chain(known).chain(left).chain([in_sync]));
    // The session lasts as long as the stream.
    let open = Some((events, reports, registry, session));
    let changes = futures::stream::unfold(open, |open| async {
        let (mut events, mut reports, registry, session) = open?;
        loop {
            let event = tokio::select! {
                event = events.recv() => event,
                Ok(()) = reports.changed() => {
                    let report = reports.borrow_and_update().clone();
                    match report {
                        Some(report) => return Some((loss(&report), Some((events, reports, registry, session)))),
                        None => continue,
                    }
                }
            };
            match event {
                Ok(id) => {
                    // One that is not known any more has been forgotten since; its end was told before.
                    if let Some(handle) = registry.get(&id) {
                        return Some((changed(&handle), Some((events, reports, registry, session))));
                    }
                }
                Err(RecvError::Closed) => return None,
                Err(RecvError::Lagged(missed)) => {
                    let message = format!("{missed} events were missed; watch again");
                    return Some((Err(ConnectError::aborted(message)), None));
                }
            }
        }
    });
    first.chain(changes)
}
