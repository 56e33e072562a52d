-- Every statement of the coordinator's store, by name. Updates are fenced: they name what the row must still be.

-- name: owner
SELECT * FROM owners WHERE owner = :owner;

-- name: put_owner
INSERT INTO owners (owner, public_key, member, terms_sha256, state, valid_in_row, audited_ms)
VALUES (:owner, :public_key, :member, :terms_sha256, :state, :valid_in_row, :audited_ms)
ON CONFLICT (owner) DO UPDATE SET
    public_key = excluded.public_key, member = excluded.member, terms_sha256 = excluded.terms_sha256,
    state = excluded.state, valid_in_row = excluded.valid_in_row, audited_ms = excluded.audited_ms;

-- name: owners
SELECT * FROM owners ORDER BY owner;

-- name: established_others
SELECT count(*) AS number FROM owners WHERE state = 'established' AND owner <> :owner;

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
INSERT INTO units (unit, round, "index", state, outcome, chosen, merged_in, retracted, unmerged_in)
VALUES (:unit, :round, :index, :state, :outcome, :chosen, :merged_in, :retracted, :unmerged_in);

-- name: unit
SELECT * FROM units WHERE unit = :unit;

-- name: next_open_unit
SELECT * FROM units WHERE round = :round AND state = 'open' ORDER BY (unit < :short_below) <> :short, "index" LIMIT 1;

-- name: save_unit
UPDATE units SET state = :state, outcome = :outcome, chosen = :chosen, merged_in = :merged_in,
    retracted = :retracted, unmerged_in = :unmerged_in
WHERE unit = :unit
  AND state = :before_state AND outcome IS :before_outcome AND chosen IS :before_chosen
  AND merged_in IS :before_merged_in AND retracted = :before_retracted AND unmerged_in IS :before_unmerged_in;

-- name: unsettled_units
SELECT * FROM units WHERE state <> 'settled' AND round <= :round ORDER BY round, "index";

-- name: units_to_unmerge
SELECT * FROM units WHERE retracted = 1 AND unmerged_in IS NULL AND merged_in IS NOT NULL ORDER BY round, "index";

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
WHERE (:round IS NULL OR units.round = :round) AND NOT units.retracted
GROUP BY owners.member ORDER BY owners.member;

-- name: add_attempt
INSERT INTO attempts (lease, unit, round, device, owner, state, deadline_ms, lease_envelope, lease_sha256,
    claim_sha256, claim_envelope, artifacts, claim_receipt, sketch, bytes_receipt, verdict_envelope,
    leased_ms, trained_ms, epoch, audit_share, scrutiny, reason, late, refused)
VALUES (:lease, :unit, :round, :device, :owner, :state, :deadline_ms, :lease_envelope, :lease_sha256,
    :claim_sha256, :claim_envelope, :artifacts, :claim_receipt, :sketch, :bytes_receipt, :verdict_envelope,
    :leased_ms, :trained_ms, :epoch, :audit_share, :scrutiny, :reason, :late, :refused);

-- name: attempt
SELECT * FROM attempts WHERE lease = :lease;

-- name: attempt_of_claim
SELECT * FROM attempts WHERE claim_sha256 = :claim_sha256;

-- name: latest_claimed
SELECT * FROM attempts WHERE device = :device AND trained_ms IS NOT NULL ORDER BY sequence DESC LIMIT 1;

-- name: save_attempt
UPDATE attempts SET state = :state, deadline_ms = :deadline_ms, claim_sha256 = :claim_sha256,
    claim_envelope = :claim_envelope, artifacts = :artifacts, claim_receipt = :claim_receipt, sketch = :sketch,
    bytes_receipt = :bytes_receipt, verdict_envelope = :verdict_envelope, trained_ms = :trained_ms, epoch = :epoch,
    audit_share = :audit_share, scrutiny = :scrutiny, reason = :reason, late = :late,
    refused = :refused
WHERE lease = :lease
  AND state = :before_state AND deadline_ms = :before_deadline_ms AND scrutiny = :before_scrutiny;

-- name: leased_attempt
SELECT * FROM attempts WHERE device = :device AND state = 'leased';

-- name: leased_count
SELECT count(*) AS number FROM attempts WHERE owner = :owner AND state = 'leased';

-- name: unsent_count
SELECT count(*) AS number FROM attempts
WHERE owner = :owner AND state IN ('claimed', 'sketched') AND deadline_ms < :never_ms;

-- name: held_by_newcomers
-- What stands for nothing before an audit has confirmed it, and keeps its unit from others all the same.
SELECT count(DISTINCT units.unit) AS number FROM units
CROSS JOIN attempts ON attempts.unit = units.unit
CROSS JOIN owners ON owners.owner = attempts.owner
WHERE units.round = :round AND units.state <> 'settled' AND owners.state = 'probation'
  AND ((attempts.state IN ('leased', 'claimed', 'sketched') AND attempts.deadline_ms < :never_ms)
    OR (attempts.state = 'received' AND attempts.scrutiny = 'pending'));

-- name: uploading_attempts
SELECT * FROM attempts WHERE device = :device AND state IN ('claimed', 'sketched') ORDER BY deadline_ms, sequence;

-- name: due_attempts
SELECT * FROM attempts WHERE state IN ('leased', 'claimed', 'sketched') AND deadline_ms <= :now_ms
ORDER BY deadline_ms, sequence;

-- name: postpone_attempts
UPDATE attempts SET deadline_ms = deadline_ms + :by_ms
WHERE state IN ('leased', 'claimed', 'sketched') AND deadline_ms > :since_ms AND deadline_ms < :never_ms;

-- name: postpone_audits
UPDATE audits SET deadline_ms = deadline_ms + :by_ms
WHERE state IN ('wants_replica', 'replicated', 'wants_bytes', 'wants_referee', 'wants_second', 'failed')
  AND deadline_ms > :since_ms;

-- name: attempts_of_unit
SELECT * FROM attempts WHERE unit = :unit ORDER BY sequence;

-- name: mergeable
-- The first result of a unit stands, a later one for the same unit does not.
SELECT attempts.* FROM attempts JOIN units ON units.unit = attempts.unit
WHERE attempts.state = 'received' AND attempts.scrutiny <> 'pending' AND units.state <> 'settled'
  AND attempts.sequence = (
    SELECT min(other.sequence) FROM attempts AS other
    WHERE other.unit = attempts.unit AND other.state = 'received' AND other.scrutiny <> 'pending')
ORDER BY attempts.round, units."index";

-- name: ready_count
SELECT count(DISTINCT attempts.unit) AS number FROM attempts JOIN units ON units.unit = attempts.unit
WHERE attempts.round = :round AND attempts.state = 'received' AND attempts.scrutiny <> 'pending'
  AND units.state <> 'settled';

-- name: wasted_count
SELECT count(*) AS number FROM attempts
WHERE owner = :owner AND round = :round
  AND (state IN ('handed_back', 'expired') OR refused
       OR (state IN ('claimed', 'sketched') AND deadline_ms = :never_ms));

-- name: unsent_in_doubt
SELECT * FROM attempts
WHERE scrutiny = 'pending' AND state IN ('claimed', 'sketched') AND round <= :round ORDER BY +sequence;

-- name: unmerged_of_owner
SELECT * FROM attempts WHERE owner = :owner AND state IN ('leased', 'claimed', 'sketched', 'received', 'excused')
ORDER BY sequence;

-- name: merged_unaudited_of_owner
SELECT attempts.* FROM attempts JOIN units ON units.unit = attempts.unit AND units.chosen = attempts.lease
WHERE attempts.owner = :owner AND NOT units.retracted
  AND NOT EXISTS (SELECT 1 FROM opinions WHERE opinions.claim = attempts.claim_sha256)
ORDER BY attempts.sequence;

-- name: merged_on_word_of
-- What passed its audit because a replica of this owner agreed, and for no better reason.
SELECT DISTINCT attempts.* FROM attempts AS replica
CROSS JOIN audits ON audits.replica = replica.lease
CROSS JOIN attempts ON attempts.lease = audits.lease
CROSS JOIN units ON units.unit = attempts.unit AND units.chosen = attempts.lease
WHERE replica.owner = :owner AND attempts.owner <> :owner AND audits.state = 'passed' AND NOT units.retracted
  AND NOT EXISTS (SELECT 1 FROM opinions WHERE opinions.claim = attempts.claim_sha256)
ORDER BY attempts.sequence;

-- name: in_doubt_count
SELECT (SELECT count(*) FROM attempts
        WHERE epoch = :epoch AND scrutiny = 'pending' AND state IN ('claimed', 'sketched', 'received'))
     + (SELECT count(*) FROM audits
        WHERE epoch = :epoch AND reason IN ('probation', 'drawn', 'too-fast', 'outlier', 'few', 'conflict', 'late')
          AND NOT appealed
          AND state IN ('wants_replica', 'replicated', 'wants_bytes', 'wants_referee', 'wants_second')) AS number;

-- name: awaited_count
-- The states are those of the index: what is only leased has no epoch yet.
SELECT count(*) AS number FROM attempts
WHERE state IN ('leased', 'claimed', 'sketched') AND deadline_ms > :now_ms AND deadline_ms < :never_ms
  AND epoch = :epoch;

-- name: add_audit
INSERT INTO audits (unit, lease, owner, claim, epoch, reason, state, deadline_ms, replica, auditor, refuted_by, appealed)
VALUES (:unit, :lease, :owner, :claim, :epoch, :reason, :state, :deadline_ms, :replica, :auditor, :refuted_by,
    :appealed);

-- name: last_audit
SELECT max(audit) AS number FROM audits;

-- name: audit
SELECT * FROM audits WHERE audit = :audit;

-- name: save_audit
UPDATE audits SET state = :state, deadline_ms = :deadline_ms, replica = :replica, auditor = :auditor,
    refuted_by = :refuted_by, appealed = :appealed
WHERE audit = :audit
  AND state = :before_state AND replica IS :before_replica AND auditor IS :before_auditor;

-- name: open_audits
SELECT * FROM audits WHERE state = :state ORDER BY audit;

-- name: audits_of_subject
SELECT * FROM audits WHERE lease = :lease ORDER BY audit;

-- name: audits_of_replica
SELECT * FROM audits WHERE replica = :replica ORDER BY audit;

-- name: failed_count
SELECT count(*) AS number FROM audits WHERE owner = :owner AND state = 'failed';

-- name: rejected_blobs
-- Two honest results of a unit can be the very same bytes: those stay with the one that was chosen.
SELECT attempts.* FROM attempts JOIN units ON units.unit = attempts.unit
WHERE attempts.state = 'judged' AND attempts.bytes_receipt IS NOT NULL AND units.chosen IS NOT attempts.lease
  AND NOT EXISTS (
    SELECT 1 FROM attempts AS chosen WHERE chosen.lease = units.chosen AND chosen.artifacts = attempts.artifacts);

-- name: audit_counts
SELECT state, count(*) AS number FROM audits GROUP BY state;

-- name: add_opinion
INSERT INTO opinions (audit, claim, auditor, finding, envelope)
VALUES (:audit, :claim, :auditor, :finding, :envelope);

-- name: opinions
SELECT * FROM opinions WHERE audit = :audit ORDER BY rowid;

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
INSERT INTO rounds (round, state, opened_ms, closed_ms, merge, unmerge, weigh_seed, manifest_sha256)
VALUES (:round, :state, :opened_ms, :closed_ms, :merge, :unmerge, :weigh_seed, :manifest_sha256);

-- name: save_round
UPDATE rounds SET state = :state, closed_ms = :closed_ms, merge = :merge, unmerge = :unmerge,
    weigh_seed = :weigh_seed, manifest_sha256 = :manifest_sha256
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
