-- Energy that made no image: attempts that lost or failed, and gaps that nobody can be charged with; null where a part is missing
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
ORDER BY energy_mj DESC NULLS LAST, t_open_wall_ns
