-- Sandboxes that persist: what they may reach, what becomes of one whose time is over, and snapshots.

ALTER TABLE sandboxes
    -- What it may reach; `allow_internet_access` says the same as the `internet` in it.
    ADD COLUMN network jsonb NOT NULL DEFAULT '{"internet": true}',
    -- Sandboxes of before were destroyed when nothing happened in them.
    ADD COLUMN on_timeout text NOT NULL DEFAULT 'kill' CHECK (on_timeout IN ('pause', 'kill')),
    ADD COLUMN deadline_at timestamptz,
    ADD COLUMN deadline_action text NOT NULL DEFAULT 'pause' CHECK (deadline_action IN ('pause', 'kill')),
    ADD COLUMN auto_resume boolean NOT NULL DEFAULT false,
    ADD COLUMN paused_at timestamptz,
    -- The snapshot that it was made from, which may have gone.
    ADD COLUMN source_snapshot text,
    -- Whether its host has still to be told of the network, the timeout and the deadline of this row.
    ADD COLUMN settings_pending boolean NOT NULL DEFAULT false;
ALTER TABLE sandboxes ALTER COLUMN on_timeout SET DEFAULT 'pause';
UPDATE sandboxes SET network = '{"internet": false}' WHERE NOT allow_internet_access;

CREATE INDEX sandboxes_settings ON sandboxes (host_id) WHERE settings_pending;

CREATE TABLE snapshots (
    id           text PRIMARY KEY,
    team_id      uuid NOT NULL REFERENCES teams (id),
    host_id      text NOT NULL REFERENCES hosts (id),
    -- Null until it is ready, when it is to go, and always for what stands between a sandbox and its forks.
    name         text,
    -- The sandbox that it was taken of, which may have gone.
    sandbox_id   text NOT NULL,
    template     text NOT NULL,
    vcpus        integer NOT NULL,
    memory_mb    integer NOT NULL,
    disk_size_mb integer NOT NULL DEFAULT 0,
    size_bytes   bigint NOT NULL DEFAULT 0,
    has_memory   boolean NOT NULL DEFAULT true,
    -- `deleting` is an order to the host that stands until it has been carried out. What has been `creating`
    -- for longer than its making can take is to go.
    state        text NOT NULL CHECK (state IN ('creating', 'ready', 'deleting')),
    created_at   timestamptz NOT NULL DEFAULT now(),
    UNIQUE (team_id, name),
    CHECK (name IS NULL OR state = 'ready')
);
CREATE INDEX snapshots_ready ON snapshots (team_id, created_at DESC, id DESC) WHERE state = 'ready';
CREATE INDEX snapshots_unfinished ON snapshots (host_id) WHERE state <> 'ready';
