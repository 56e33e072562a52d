-- Every statement of the coordinator's store, by name. Updates are fenced: they name what the row must still be.

-- name: owner
SELECT * FROM owners WHERE owner = :owner;

-- name: put_owner
INSERT INTO owners (owner, public_key, member, terms_sha256, state, valid_in_row)
VALUES (:owner, :public_key, :member, :terms_sha256, :state, :valid_in_row)
ON CONFLICT (owner) DO UPDATE SET
    public_key = excluded.public_key, member = excluded.member, terms_sha256 = excluded.terms_sha256,
    state = excluded.state, valid_in_row = excluded.valid_in_row;

-- name: device
SELECT * FROM devices WHERE device = :device;

-- name: put_device
INSERT INTO devices (device, public_key, owner, delegation_envelope, device_class, trainer_version)
VALUES (:device, :public_key, :owner, :delegation_envelope, :device_class, :trainer_version)
ON CONFLICT (device) DO UPDATE SET
    public_key = excluded.public_key, owner = excluded.owner, delegation_envelope = excluded.delegation_envelope,
    device_class = excluded.device_class, trainer_version = excluded.trainer_version;

-- name: device_count
SELECT count(*) AS number FROM devices;

-- name: add_unit
INSERT INTO units (unit, round, "index", state, outcome, chosen, merged_in)
VALUES (:unit, :round, :index, :state, :outcome, :chosen, :merged_in);

-- name: unit
SELECT * FROM units WHERE unit = :unit;

-- name: next_open_unit
SELECT * FROM units WHERE round = :round AND state = 'open' ORDER BY "index" LIMIT 1;

-- name: save_unit
UPDATE units SET state = :state, outcome = :outcome, chosen = :chosen, merged_in = :merged_in
WHERE unit = :unit
  AND state = :before_state AND outcome IS :before_outcome AND chosen IS :before_chosen
  AND merged_in IS :before_merged_in;

-- name: units
SELECT * FROM units WHERE round = :round ORDER BY "index";

-- name: unit_counts
SELECT state, count(*) AS number FROM units WHERE round = :round GROUP BY state;

-- name: outcome_counts
SELECT outcome, count(*) AS number FROM units
WHERE outcome IS NOT NULL AND (:round IS NULL OR round = :round)
GROUP BY outcome;

-- name: units_by_member
SELECT owners.member, count(*) AS number
FROM units JOIN attempts ON attempts.lease = units.chosen JOIN owners ON owners.owner = attempts.owner
WHERE :round IS NULL OR units.round = :round
GROUP BY owners.member ORDER BY owners.member;

-- name: add_attempt
INSERT INTO attempts (lease, unit, round, device, owner, state, deadline_ms, lease_envelope, lease_sha256,
    claim_sha256, claim_envelope, artifacts, claim_receipt, sketch, bytes_receipt, verdict_envelope)
VALUES (:lease, :unit, :round, :device, :owner, :state, :deadline_ms, :lease_envelope, :lease_sha256,
    :claim_sha256, :claim_envelope, :artifacts, :claim_receipt, :sketch, :bytes_receipt, :verdict_envelope);

-- name: attempt
SELECT * FROM attempts WHERE lease = :lease;

-- name: attempt_of_claim
SELECT * FROM attempts WHERE claim_sha256 = :claim_sha256;

-- name: save_attempt
UPDATE attempts SET state = :state, deadline_ms = :deadline_ms, claim_sha256 = :claim_sha256,
    claim_envelope = :claim_envelope, artifacts = :artifacts, claim_receipt = :claim_receipt, sketch = :sketch,
    bytes_receipt = :bytes_receipt, verdict_envelope = :verdict_envelope
WHERE lease = :lease
  AND state = :before_state AND deadline_ms = :before_deadline_ms;

-- name: leased_attempt
SELECT * FROM attempts WHERE device = :device AND state = 'leased';

-- name: leased_count
SELECT count(*) AS number FROM attempts WHERE owner = :owner AND state = 'leased';

-- name: uploading_attempts
SELECT * FROM attempts WHERE device = :device AND state IN ('claimed', 'sketched') ORDER BY deadline_ms, sequence;

-- name: due_attempts
SELECT * FROM attempts WHERE state IN ('leased', 'claimed', 'sketched') AND deadline_ms <= :now_ms
ORDER BY deadline_ms, sequence;

-- name: attempts_of_unit
SELECT * FROM attempts WHERE unit = :unit ORDER BY sequence;

-- name: mergeable_units
SELECT units.* FROM units JOIN attempts ON attempts.lease = units.chosen
WHERE units.outcome = 'accepted' AND units.merged_in IS NULL AND attempts.state = 'received'
ORDER BY units.round, units."index";

-- name: unjudged
-- The plus sign keeps SQLite from walking through all attempts in order of sequence to find these few.
SELECT * FROM attempts WHERE state IN ('received', 'excused') AND round < :before_round ORDER BY +sequence;

-- name: received_count
SELECT count(DISTINCT unit) AS number FROM attempts
WHERE round = :round AND state IN ('received', 'excused') AND bytes_receipt IS NOT NULL;

-- name: add_evidence
INSERT INTO evidence (lease, number, claim_envelope)
SELECT :lease, count(*) + 1, :claim_envelope FROM evidence WHERE lease = :lease HAVING count(*) < :most
ON CONFLICT (lease, claim_envelope) DO NOTHING;

-- name: evidence
SELECT claim_envelope FROM evidence WHERE lease = :lease ORDER BY number;

-- name: round
SELECT * FROM rounds WHERE round = :round;

-- name: latest_round
SELECT * FROM rounds ORDER BY round DESC LIMIT 1;

-- name: add_round
INSERT INTO rounds (round, state, opened_ms, closed_ms, merge, manifest_sha256)
VALUES (:round, :state, :opened_ms, :closed_ms, :merge, :manifest_sha256);

-- name: save_round
UPDATE rounds SET state = :state, closed_ms = :closed_ms, merge = :merge, manifest_sha256 = :manifest_sha256
WHERE round = :round AND state = :before_state;

-- name: append_log
INSERT INTO log (position, kind, body, head) VALUES (:position, :kind, :body, :head);

-- name: log_entries
SELECT * FROM log WHERE position BETWEEN :first AND :last ORDER BY position;

-- name: log_head
SELECT position, head FROM log ORDER BY position DESC LIMIT 1;

-- name: meta
SELECT value FROM meta WHERE key = :key;

-- name: put_meta
INSERT INTO meta (key, value) VALUES (:key, :value) ON CONFLICT (key) DO UPDATE SET value = excluded.value;
