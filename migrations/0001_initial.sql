-- Teams, their keys, the hosts, the sandboxes, and who did what.

CREATE TABLE teams (
    id         uuid PRIMARY KEY,
    name       text NOT NULL UNIQUE CHECK (length(name) BETWEEN 1 AND 128),
    created_at timestamptz NOT NULL DEFAULT now()
);

-- The key itself is never stored: it is 128 random bits, so its SHA-256 is enough.
CREATE TABLE api_keys (
    id         uuid PRIMARY KEY,
    team_id    uuid NOT NULL REFERENCES teams (id) ON DELETE CASCADE,
    name       text NOT NULL,
    key_hash   bytea NOT NULL UNIQUE CHECK (length(key_hash) = 32),
    key_prefix text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    -- Written by a coalescing task, not by each request.
    last_used  timestamptz
);
CREATE INDEX api_keys_team ON api_keys (team_id);

CREATE TABLE hosts (
    id           text PRIMARY KEY,
    version      text NOT NULL,
    vmm          text NOT NULL,
    vmm_version  text NOT NULL,
    accelerator  text NOT NULL,
    created_at   timestamptz NOT NULL DEFAULT now(),
    last_seen_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE sandboxes (
    id                    text PRIMARY KEY,
    team_id               uuid NOT NULL REFERENCES teams (id),
    host_id               text NOT NULL REFERENCES hosts (id),
    template              text NOT NULL,
    state                 text NOT NULL CHECK (state IN (
        'pending', 'starting', 'running', 'pausing', 'paused', 'snapshotting', 'resuming', 'hibernated',
        'stopping', 'stopped', 'missing', 'error')),
    -- Goes up with every intent. A state changes only where state and generation are still those that the
    -- decision was made from, and a host agent refuses commands of an older generation.
    generation            bigint NOT NULL,
    vcpus                 integer NOT NULL,
    memory_mb             integer NOT NULL,
    -- Null until the host has chosen, where the caller has not.
    disk_size_mb          integer,
    timeout_sec           integer NOT NULL,
    metadata              jsonb NOT NULL DEFAULT '{}',
    allow_internet_access boolean NOT NULL,
    -- What the guest's agent asks of every caller.
    access_token          text NOT NULL,
    end_reason            text,
    end_message           text,
    created_at            timestamptz NOT NULL DEFAULT now(),
    started_at            timestamptz,
    last_active_at        timestamptz,
    last_updated          timestamptz NOT NULL DEFAULT now()
);
-- Lists: what is live of a team, newest first, in pages.
CREATE INDEX sandboxes_live ON sandboxes (team_id, created_at DESC, id DESC)
    WHERE state NOT IN ('stopped', 'error');
CREATE INDEX sandboxes_all ON sandboxes (team_id, created_at DESC, id DESC);
-- What a host should have, compared with what it says it has.
CREATE INDEX sandboxes_host ON sandboxes (host_id) WHERE state NOT IN ('stopped', 'error');

CREATE TABLE audit_log (
    id            uuid PRIMARY KEY,
    team_id       uuid NOT NULL,
    actor_type    text NOT NULL,
    actor_id      text NOT NULL,
    actor_name    text NOT NULL,
    resource_type text NOT NULL,
    resource_id   text NOT NULL,
    action        text NOT NULL,
    -- 'success', or the code of the error.
    status        text NOT NULL,
    metadata      jsonb NOT NULL DEFAULT '{}',
    created_at    timestamptz NOT NULL
);
CREATE INDEX audit_log_team ON audit_log (team_id, created_at DESC, id DESC);
