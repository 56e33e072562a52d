-- The coordinator's database, version 1. SQLite, STRICT tables.
--
-- What the lifecycle tables forbid is forbidden here once more, where no mistake in a program can get past it:
-- states and the columns that belong to them are held together by CHECKs, "at most one" by partial unique indexes,
-- "never again" by triggers. Times are UTC milliseconds. Envelopes are the signed bytes as they came or went.

CREATE TABLE owners (
    owner           TEXT PRIMARY KEY NOT NULL CHECK (length(owner) = 64 AND owner NOT GLOB '*[^0-9a-f]*'),
    public_key      TEXT NOT NULL UNIQUE,
    member          TEXT NOT NULL UNIQUE,       -- the pseudonym in the public log
    terms_sha256    TEXT NOT NULL,
    state           TEXT NOT NULL CHECK (state IN ('probation', 'established', 'banned')),
    valid_in_row    INTEGER NOT NULL CHECK (valid_in_row >= 0),
    audited_ms      INTEGER NOT NULL CHECK (audited_ms >= 0)
) STRICT, WITHOUT ROWID;

CREATE INDEX owners_by_state ON owners (state);

CREATE TRIGGER a_ban_ends_in_probation_only BEFORE UPDATE OF state ON owners
WHEN OLD.state = 'banned' AND NEW.state NOT IN ('banned', 'probation')
BEGIN SELECT RAISE(ABORT, 'an owner who was banned begins again on probation'); END;

CREATE TABLE devices (
    device              TEXT PRIMARY KEY NOT NULL CHECK (length(device) = 64 AND device NOT GLOB '*[^0-9a-f]*'),
    public_key          TEXT NOT NULL UNIQUE,
    owner               TEXT NOT NULL REFERENCES owners (owner),
    delegation_envelope BLOB NOT NULL,
    device_class        TEXT NOT NULL,
    trainer_version     TEXT NOT NULL
) STRICT, WITHOUT ROWID;

CREATE INDEX devices_of_owner ON devices (owner);

CREATE TABLE rounds (
    round           INTEGER PRIMARY KEY CHECK (round >= 1),
    state           TEXT NOT NULL CHECK (state IN ('collecting', 'closed', 'merging', 'published')),
    opened_ms       INTEGER NOT NULL CHECK (opened_ms >= 0),
    closed_ms       INTEGER CHECK (closed_ms >= opened_ms),
    merge           TEXT NOT NULL,              -- JSON array of merge entries, '[]' before the close
    unmerge         TEXT NOT NULL,              -- JSON array of what is taken out again, '[]' before the close
    weigh_seed      TEXT,                       -- of the sketches that weighed the merge
    manifest_sha256 TEXT,
    CHECK ((closed_ms IS NULL) = (state = 'collecting')),
    CHECK (state <> 'collecting' OR (merge = '[]' AND unmerge = '[]' AND weigh_seed IS NULL)),
    CHECK ((manifest_sha256 IS NOT NULL) = (state = 'published'))
) STRICT;

-- A round trains from what the round before it published.
CREATE UNIQUE INDEX one_unpublished_round ON rounds ((state <> 'published')) WHERE state <> 'published';

CREATE TRIGGER a_merge_set_is_fixed_at_close BEFORE UPDATE OF merge, unmerge, weigh_seed ON rounds
WHEN OLD.state <> 'collecting' AND (
    NEW.merge <> OLD.merge OR NEW.unmerge <> OLD.unmerge OR NEW.weigh_seed IS NOT OLD.weigh_seed)
BEGIN SELECT RAISE(ABORT, 'the merge set of a closed round is fixed'); END;

CREATE TRIGGER a_published_round_stays BEFORE UPDATE ON rounds
WHEN OLD.state = 'published'
BEGIN SELECT RAISE(ABORT, 'a published round does not change'); END;

CREATE TABLE units (
    unit                TEXT PRIMARY KEY NOT NULL CHECK (length(unit) = 64 AND unit NOT GLOB '*[^0-9a-f]*'),
    round               INTEGER NOT NULL REFERENCES rounds (round) DEFERRABLE INITIALLY DEFERRED,
    "index"             INTEGER NOT NULL CHECK ("index" >= 0),
    state               TEXT NOT NULL CHECK (state IN ('open', 'assigned', 'settled')),
    outcome             TEXT CHECK (outcome IN ('accepted', 'rejected', 'abandoned')),
    chosen              TEXT,                   -- the lease of the attempt to merge
    merged_in           INTEGER CHECK (merged_in >= round),
    retracted           INTEGER NOT NULL CHECK (retracted IN (0, 1)),  -- an audit back refuted it
    unmerged_in         INTEGER CHECK (unmerged_in > merged_in),
    -- Only there to be half of a foreign key: a chosen attempt is one whose bytes were received.
    chosen_has_bytes    INTEGER GENERATED ALWAYS AS (CASE WHEN chosen IS NOT NULL THEN 1 END) STORED,
    UNIQUE (round, "index"),
    UNIQUE (unit, round),
    CHECK ((outcome IS NOT NULL) = (state = 'settled')),
    CHECK ((chosen IS NOT NULL) = (outcome IS NOT NULL AND outcome = 'accepted')),
    CHECK (merged_in IS NULL OR chosen IS NOT NULL),
    CHECK (unmerged_in IS NULL OR (retracted = 1 AND merged_in IS NOT NULL)),
    FOREIGN KEY (chosen, unit, chosen_has_bytes) REFERENCES attempts (lease, unit, has_bytes)
        DEFERRABLE INITIALLY DEFERRED
) STRICT;

CREATE INDEX units_to_lease ON units (round, "index") WHERE state = 'open';
CREATE INDEX units_to_end ON units (round) WHERE state <> 'settled';
CREATE INDEX units_to_unmerge ON units (round, "index") WHERE retracted = 1 AND unmerged_in IS NULL;

CREATE TRIGGER a_settled_unit_stays BEFORE UPDATE ON units
WHEN OLD.state = 'settled' AND (
    NEW.state <> 'settled' OR NEW.outcome <> OLD.outcome OR NEW.chosen IS NOT OLD.chosen
    OR (OLD.merged_in IS NOT NULL AND NEW.merged_in IS NOT OLD.merged_in)
    OR (OLD.unmerged_in IS NOT NULL AND NEW.unmerged_in IS NOT OLD.unmerged_in))
BEGIN SELECT RAISE(ABORT, 'a settled unit stays as it is, and is merged once'); END;

CREATE TABLE attempts (
    sequence            INTEGER PRIMARY KEY,    -- order of arrival
    lease               TEXT NOT NULL UNIQUE CHECK (length(lease) = 32 AND lease NOT GLOB '*[^0-9a-f]*'),
    unit                TEXT NOT NULL,
    round               INTEGER NOT NULL,
    device              TEXT NOT NULL REFERENCES devices (device),
    owner               TEXT NOT NULL REFERENCES owners (owner),
    state               TEXT NOT NULL CHECK (state IN
        ('leased', 'claimed', 'sketched', 'received', 'excused', 'expired', 'judged', 'handed_back')),
    deadline_ms         INTEGER NOT NULL,
    lease_envelope      BLOB NOT NULL,
    lease_sha256        TEXT NOT NULL,
    claim_sha256        TEXT UNIQUE CHECK (length(claim_sha256) = 64 AND claim_sha256 NOT GLOB '*[^0-9a-f]*'),
    claim_envelope      BLOB,
    artifacts           TEXT NOT NULL,          -- JSON array of what the claim commits to, '[]' before it
    claim_receipt       BLOB,
    sketch              BLOB CHECK (length(sketch) = 4096),
    bytes_receipt       BLOB,
    verdict_envelope    BLOB,
    leased_ms           INTEGER NOT NULL CHECK (leased_ms >= 0),
    trained_ms          INTEGER CHECK (trained_ms >= 0),
    epoch               INTEGER CHECK (epoch >= 1),
    audit_share         INTEGER NOT NULL CHECK (audit_share BETWEEN 0 AND 16777216),
    scrutiny            TEXT NOT NULL CHECK (scrutiny IN ('none', 'pending', 'confirmed')),
    reason              TEXT,                   -- why it is audited
    late                INTEGER NOT NULL CHECK (late >= 0),
    refused             INTEGER NOT NULL CHECK (refused IN (0, 1)),    -- its bytes were no delta of this run
    has_bytes           INTEGER NOT NULL GENERATED ALWAYS AS (bytes_receipt IS NOT NULL) STORED,
    UNIQUE (lease, unit, has_bytes),
    FOREIGN KEY (unit, round) REFERENCES units (unit, round),
    -- A claim's parts come together, and each step keeps what the steps before it brought.
    CHECK ((claim_envelope IS NULL) = (claim_sha256 IS NULL)),
    CHECK ((claim_receipt IS NULL) = (claim_sha256 IS NULL)),
    CHECK ((artifacts = '[]') = (claim_sha256 IS NULL)),
    CHECK ((trained_ms IS NULL) = (claim_sha256 IS NULL)),
    CHECK ((epoch IS NULL) = (claim_sha256 IS NULL)),
    CHECK (scrutiny <> 'pending' OR reason IS NOT NULL),
    CHECK (sketch IS NULL OR claim_sha256 IS NOT NULL),
    CHECK (bytes_receipt IS NULL OR sketch IS NOT NULL),
    -- A judged attempt holds whatever it had; every other state says exactly what is there.
    CHECK (state = 'judged'
        OR (claim_sha256 IS NOT NULL) = (state IN ('claimed', 'sketched', 'received', 'excused'))),
    CHECK (state = 'judged' OR (sketch IS NOT NULL) = (state IN ('sketched', 'received', 'excused'))),
    CHECK (state = 'judged' OR (bytes_receipt IS NOT NULL) = (state = 'received')),
    CHECK ((verdict_envelope IS NOT NULL) = (state = 'judged' AND claim_sha256 IS NOT NULL))
) STRICT;

CREATE UNIQUE INDEX one_lease_per_device ON attempts (device) WHERE state = 'leased';
CREATE UNIQUE INDEX one_lease_per_unit ON attempts (unit) WHERE state = 'leased';
CREATE INDEX attempts_of_unit ON attempts (unit);
CREATE INDEX attempts_of_device ON attempts (device);
CREATE INDEX attempts_of_owner ON attempts (owner);
CREATE INDEX attempts_to_upload ON attempts (device) WHERE state IN ('claimed', 'sketched');
CREATE INDEX attempts_by_deadline ON attempts (deadline_ms) WHERE state IN ('leased', 'claimed', 'sketched');
CREATE INDEX attempts_to_judge ON attempts (round) WHERE state IN ('received', 'excused');
CREATE INDEX attempts_to_merge ON attempts (unit) WHERE state = 'received' AND scrutiny <> 'pending';
CREATE INDEX attempts_in_doubt ON attempts (epoch)
    WHERE scrutiny = 'pending' AND state IN ('claimed', 'sketched', 'received');
CREATE INDEX attempts_unsent_in_doubt ON attempts (round)
    WHERE scrutiny = 'pending' AND state IN ('claimed', 'sketched');

CREATE TRIGGER a_claim_stands BEFORE UPDATE OF claim_sha256, claim_envelope, artifacts ON attempts
WHEN OLD.claim_sha256 IS NOT NULL AND (
    NEW.claim_sha256 IS NOT OLD.claim_sha256 OR NEW.claim_envelope IS NOT OLD.claim_envelope
    OR NEW.artifacts <> OLD.artifacts)
BEGIN SELECT RAISE(ABORT, 'the first claim under a lease stands'); END;

-- But for the verdict, which an audit back or an appeal can change.
CREATE TRIGGER an_ended_attempt_stays BEFORE UPDATE ON attempts
WHEN OLD.state IN ('judged', 'handed_back') AND (
    NEW.state <> OLD.state OR NEW.deadline_ms <> OLD.deadline_ms OR NEW.scrutiny <> OLD.scrutiny
    OR NEW.sketch IS NOT OLD.sketch OR NEW.bytes_receipt IS NOT OLD.bytes_receipt
    OR NEW.late <> OLD.late OR (NEW.verdict_envelope IS NULL) <> (OLD.verdict_envelope IS NULL))
BEGIN SELECT RAISE(ABORT, 'an attempt that has ended does not change'); END;

CREATE TABLE audits (
    audit           INTEGER PRIMARY KEY CHECK (audit >= 1),
    unit            TEXT NOT NULL REFERENCES units (unit),
    lease           TEXT NOT NULL REFERENCES attempts (lease),     -- the subject
    owner           TEXT NOT NULL REFERENCES owners (owner),       -- the subject's
    claim           TEXT NOT NULL,
    epoch           INTEGER NOT NULL CHECK (epoch >= 1),
    reason          TEXT NOT NULL CHECK (reason IN
        ('probation', 'drawn', 'outlier', 'few', 'too-fast', 'conflict', 'late', 'overdue', 'distrusted', 'replica',
         'recheck')),
    state           TEXT NOT NULL CHECK (state IN ('wants_replica', 'replicated', 'wants_bytes', 'wants_referee',
        'wants_second', 'passed', 'failed', 'dropped')),
    deadline_ms     INTEGER NOT NULL,
    replica         TEXT REFERENCES attempts (lease) CHECK (replica <> lease),
    auditor         TEXT,
    refuted_by      TEXT,
    appealed        INTEGER NOT NULL CHECK (appealed IN (0, 1)),
    CHECK (replica IS NOT NULL OR state NOT IN ('replicated', 'wants_bytes')),
    CHECK (refuted_by IS NOT NULL OR state NOT IN ('wants_second', 'failed'))
) STRICT;

CREATE INDEX audits_by_state ON audits (state, audit);
CREATE INDEX audits_of_subject ON audits (lease);
CREATE INDEX audits_of_replica ON audits (replica) WHERE replica IS NOT NULL;
CREATE INDEX audits_of_epoch ON audits (epoch);
CREATE INDEX audits_of_owner ON audits (owner);

CREATE TABLE opinions (
    audit           INTEGER NOT NULL REFERENCES audits (audit),
    claim           TEXT NOT NULL,
    auditor         TEXT NOT NULL,
    finding         TEXT NOT NULL CHECK (finding IN ('confirmed', 'refuted')),
    envelope        BLOB NOT NULL,
    PRIMARY KEY (audit, claim, auditor)
) STRICT;

CREATE INDEX opinions_by_claim ON opinions (claim);

CREATE TRIGGER an_opinion_stays BEFORE UPDATE ON opinions
BEGIN SELECT RAISE(ABORT, 'an opinion does not change'); END;

CREATE TABLE evidence (
    lease           TEXT NOT NULL REFERENCES attempts (lease),
    number          INTEGER NOT NULL CHECK (number >= 1),
    claim_envelope  BLOB NOT NULL,
    PRIMARY KEY (lease, number),
    UNIQUE (lease, claim_envelope)
) STRICT;

CREATE TABLE log (
    position    INTEGER PRIMARY KEY CHECK (position >= 1),
    kind        TEXT NOT NULL,
    body        BLOB NOT NULL,                  -- canonical JSON
    head        BLOB NOT NULL UNIQUE CHECK (length(head) = 32)
) STRICT;

CREATE TRIGGER the_log_has_no_gaps BEFORE INSERT ON log
WHEN NEW.position <> (SELECT coalesce(max(position), 0) + 1 FROM log)
BEGIN SELECT RAISE(ABORT, 'log entries are numbered without gaps'); END;

CREATE TRIGGER the_log_is_not_rewritten BEFORE UPDATE ON log
BEGIN SELECT RAISE(ABORT, 'log entries do not change'); END;

CREATE TRIGGER the_log_is_not_cut BEFORE DELETE ON log
BEGIN SELECT RAISE(ABORT, 'log entries do not go'); END;

CREATE TABLE meta (
    key     TEXT PRIMARY KEY NOT NULL,
    value   TEXT NOT NULL
) STRICT, WITHOUT ROWID;
