//! The filesystem service: stat, list, make, move, remove, watch.
//!
//! | module | what it is |
//! |---|---|
//! | [`operations`] | what is done for one who asks |
//! | [`entry`] | what a client is told of a file |
//! | [`watch`] | watching directories |
//! | [`mounts`] | what kind of file system a directory is on |
//! | [`error`] | why something is refused |
//!
//! Everything is done by the agent itself, which is root; what it makes is given to the user of the request. The work
//! runs on threads that may block, because a path can lead to a file system that does not answer. Only so many of them
//! are for this service ([`THREADS`]): where all of them wait for such a file system, programs still start and files
//! elsewhere are still sent, and a request that finds none free in time is told so.

mod entry;
mod error;
mod mounts;
mod operations;
mod watch;

use std::sync::Arc;

use connectrpc::{ConnectError, RequestContext, Response, ServiceRequest, ServiceResult, ServiceStream};
use http::HeaderMap;
use tokio::time::Instant;
use wrenn_proto::filesystem as wire;

pub(crate) use self::watch::THREADS as WATCH_THREADS;
use self::{
    error::FilesystemError,
    operations::Asker,
    watch::{Wanted, Watchers},
};
use super::{auth::basic_user, process::keepalive, state::Agent, threads::Threads};

/// How many entries one list may hold.
const MAXIMUM_ENTRIES: usize = 100_000;
/// How many operations run at once.
pub(crate) const THREADS: usize = 24;

/// The service.
#[derive(Debug)]
pub(crate) struct FilesystemService {
    agent: Arc<Agent>,
    threads: Threads,
    watchers: Watchers,
}

impl FilesystemService {
    pub(crate) fn new(agent: Arc<Agent>) -> Self {
        watch::raise_kernel_limits(agent.place);
        Self { agent, threads: Threads::new(THREADS), watchers: Watchers::default() }
    }

    /// Does something for whoever asks, on a thread that may block.
    async fn ask<T: Send + 'static>(
        &self,
        headers: &HeaderMap,
        work: impl FnOnce(&Asker) -> Result<T, FilesystemError> + Send + 'static,
    ) -> Result<T, ConnectError> {
        let (name, identity) = (basic_user(headers), self.agent.identity());
        let work = move || work(&Asker::new(name, identity)?);
        Ok(self.threads.run(work).await.map_err(FilesystemError::from)??)
    }

    /// What a client wants to watch, with the path that it means.
    async fn wanted(&self, headers: &HeaderMap, mut wanted: Wanted) -> Result<Wanted, ConnectError> {
        let path = std::mem::take(&mut wanted.path);
        wanted.path = self.ask(headers, move |asker| asker.resolve(&path)).await?;
        Ok(wanted)
    }
}

impl wire::Filesystem for FilesystemService {
    async fn stat(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, wire::StatRequest>,
    ) -> ServiceResult<wire::StatResponse> {
        let path = request.path.to_owned();
        let work = move |asker: &Asker| asker.describe(&asker.resolve(&path)?);
        let entry = self.ask(context.headers(), work).await?;
        Response::ok(wire::StatResponse { entry: entry.into(), ..Default::default() })
    }

    async fn make_dir(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, wire::MakeDirRequest>,
    ) -> ServiceResult<wire::MakeDirResponse> {
        let path = request.path.to_owned();
        let entry = self.ask(context.headers(), move |asker| asker.make_directory(&path)).await?;
        Response::ok(wire::MakeDirResponse { entry: entry.into(), ..Default::default() })
    }

    async fn r#move(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, wire::MoveRequest>,
    ) -> ServiceResult<wire::MoveResponse> {
        let (source, destination) = (request.source.to_owned(), request.destination.to_owned());
        let entry = self.ask(context.headers(), move |asker| asker.rename(&source, &destination)).await?;
        Response::ok(wire::MoveResponse { entry: entry.into(), ..Default::default() })
    }

    async fn list_dir(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, wire::ListDirRequest>,
    ) -> ServiceResult<wire::ListDirResponse> {
        let (path, depth) = (request.path.to_owned(), request.depth);
        let entries = self.ask(context.headers(), move |asker| asker.list(&path, depth)).await?;
        Response::ok(wire::ListDirResponse { entries, ..Default::default() })
    }

    async fn remove(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, wire::RemoveRequest>,
    ) -> ServiceResult<wire::RemoveResponse> {
        let path = request.path.to_owned();
        self.ask(context.headers(), move |asker| asker.remove(&path)).await?;
        Response::ok(wire::RemoveResponse::default())
    }

    async fn watch_dir(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, wire::WatchDirRequest>,
    ) -> ServiceResult<ServiceStream<wire::WatchDirResponse>> {
        let wanted = Wanted {
            path: request.path.to_owned(),
            recursive: request.recursive,
            include_entry: request.include_entry,
            allow_network_mounts: request.allow_network_mounts,
        };
        let wanted = self.wanted(context.headers(), wanted).await?;
        let watch = self.watchers.watch(wanted).await?;
        let deadline = context.deadline().map(Instant::from_std);
        let events = watch::events(watch, keepalive(context.headers()), deadline);
        // Compressing them would hold them back.
        Ok(Response::stream(events).compress(false))
    }

    async fn create_watcher(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, wire::CreateWatcherRequest>,
    ) -> ServiceResult<wire::CreateWatcherResponse> {
        let wanted = Wanted {
            path: request.path.to_owned(),
            recursive: request.recursive,
            include_entry: request.include_entry,
            allow_network_mounts: request.allow_network_mounts,
        };
        let wanted = self.wanted(context.headers(), wanted).await?;
        let watcher_id = self.watchers.create(wanted).await?;
        Response::ok(wire::CreateWatcherResponse { watcher_id, ..Default::default() })
    }

    async fn get_watcher_events(
        &self,
        _context: RequestContext,
        request: ServiceRequest<'_, wire::GetWatcherEventsRequest>,
    ) -> ServiceResult<wire::GetWatcherEventsResponse> {
        let events = self.watchers.events(request.watcher_id).await?;
        Response::ok(wire::GetWatcherEventsResponse { events, ..Default::default() })
    }

    async fn remove_watcher(
        &self,
        _context: RequestContext,
        request: ServiceRequest<'_, wire::RemoveWatcherRequest>,
    ) -> ServiceResult<wire::RemoveWatcherResponse> {
        self.watchers.remove(request.watcher_id)?;
        Response::ok(wire::RemoveWatcherResponse::default())
    }
}
