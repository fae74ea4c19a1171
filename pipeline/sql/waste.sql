-- Energy that made no accepted image: attempts that lost or failed, filtered and quarantined images, and gaps; null where a part is missing
-- A filtered or quarantined class is a part of a committed shard's segment: its images' equal share of it, without a time of its own.
SELECT run_id, segment_class, shard_id, attempt_id, worker_id,
    min(t_open_wall_ns) AS t_open_wall_ns,
    max(t_close_mono_ns - t_open_mono_ns) / 1e9 AS seconds,
    CASE WHEN bool_and(energy_mj IS NOT NULL) THEN sum(energy_mj)::BIGINT END AS energy_mj,
    sum(energy_mj)::BIGINT AS known_mj,
    count(*) FILTER (energy_mj IS NULL) AS domains_not_measured
FROM segment
WHERE segment_class IN ('loser', 'retry', 'gap')
GROUP BY run_id, segment_id, segment_class, shard_id, attempt_id, worker_id,
    CASE WHEN segment_id IS NULL THEN boot_id || epoch || domain || t_open_mono_ns END
UNION ALL
SELECT run_id, 'filtered', shard_id, attempt_id, worker_id, t_start_wall_ns, NULL,
    energy_filtered_mj, energy_filtered_mj, (energy_filtered_mj IS NULL)::BIGINT
FROM attempt
WHERE images_filtered > 0
UNION ALL
SELECT run_id, 'quarantined', shard_id, attempt_id, worker_id, t_start_wall_ns, NULL,
    energy_quarantined_mj, energy_quarantined_mj, (energy_quarantined_mj IS NULL)::BIGINT
FROM attempt
WHERE energy_quarantined_mj > 0 OR images_drawn > images_ok + images_filtered
ORDER BY energy_mj DESC NULLS LAST, t_open_wall_ns
