//! The steps of a new process, and how it can fail.

use std::{fmt, io, path::PathBuf};

/// What the child does between its birth and its program, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Step {
    /// Signals are reset to what a fresh process has.
    ResetSignals = 1,
    /// It becomes the leader of a new session.
    NewSession,
    /// It moves into its control group.
    EnterControlGroup,
    /// It enters its network namespace.
    EnterNetworkNamespace,
    /// It leaves the parent's mount namespace.
    NewMountNamespace,
    /// A directory is mounted over another.
    BindMount,
    /// How willingly the kernel kills it when memory is short.
    SetOomScore,
    /// It leaves no core dump.
    ForbidCoreDump,
    /// Standard input, output and error, and the descriptors it keeps.
    ArrangeDescriptors,
    /// It enters a root of its own.
    EnterJail,
    /// It gives up what rights it could have later.
    DropRights,
    /// It becomes another user.
    ChangeUser,
    /// Some of its calls are answered by its parent.
    HoldOpens,
    /// Its working directory.
    ChangeDirectory,
    /// It asks to be killed when its parent dies.
    DieWithParent,
    /// It executes the program.
    Execute,
}

impl Step {
    pub(super) const ALL: [Self; 16] = [
        Self::ResetSignals,
        Self::NewSession,
        Self::EnterControlGroup,
        Self::EnterNetworkNamespace,
        Self::NewMountNamespace,
        Self::BindMount,
        Self::SetOomScore,
        Self::ForbidCoreDump,
        Self::ArrangeDescriptors,
        Self::EnterJail,
        Self::DropRights,
        Self::ChangeUser,
        Self::HoldOpens,
        Self::ChangeDirectory,
        Self::DieWithParent,
        Self::Execute,
    ];
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ResetSignals => "reset the signals",
            Self::NewSession => "start a session",
            Self::EnterControlGroup => "enter the control group",
            Self::EnterNetworkNamespace => "enter the network namespace",
            Self::NewMountNamespace => "make a mount namespace",
            Self::BindMount => "mount a directory",
            Self::SetOomScore => "set the score for when memory is short",
            Self::ForbidCoreDump => "forbid a core dump",
            Self::ArrangeDescriptors => "arrange the file descriptors",
            Self::EnterJail => "make a root of its own",
            Self::DropRights => "give up rights",
            Self::ChangeUser => "change the user",
            Self::HoldOpens => "hold its opens",
            Self::ChangeDirectory => "enter the working directory",
            Self::DieWithParent => "tie it to its parent",
            Self::Execute => "execute the program",
        })
    }
}

/// Why a process was not made. Nothing is left of it.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// No such program on the `PATH`.
    #[error("there is no program {0} on the PATH")]
    NoProgram(String),
    /// A text cannot be given to the kernel.
    #[error("an argument, a variable or a path of {0} holds a NUL byte")]
    Nul(String),
    /// A file that was to be opened for it could not be.
    #[error("could not open {path} for {program}")]
    Open {
        /// The program.
        program: String,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The kernel made no process, or lacked what it takes to make one.
    #[error("could not make a process for {program}")]
    Clone {
        /// The program.
        program: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The new process failed before its program ran.
    #[error("could not {step} for {program}")]
    Step {
        /// The program.
        program: String,
        /// The step that failed.
        step: Step,
        /// Why.
        #[source]
        source: io::Error,
    },
}
