-- Device time and energy of committed shards by pool and by how its workers had loaded the model; energy is null where a part of it is
WITH drawn AS (
    SELECT run_id, segment_id, worker_id, shard_id, any_value(t_close_mono_ns - t_open_mono_ns) AS lasted_ns,
        CASE WHEN bool_and(energy_mj IS NOT NULL) THEN sum(energy_mj) END AS energy_mj,
        any_value(energy_estimate_mj) AS energy_estimate_mj
    FROM segment
    WHERE segment_class = 'shard'
    GROUP BY ALL
)
SELECT run_id, pool, engine, rungs, batch_size, cpu_threads, coalesce(device_name, device) AS device,
    count(DISTINCT worker_id) AS workers,
    count(DISTINCT shard_id) AS shards_drawn_at,
    sum(lasted_ns) / 1e9 AS device_seconds,
    CASE WHEN bool_and(energy_mj IS NOT NULL) THEN sum(energy_mj)::BIGINT END AS energy_mj,
    sum(energy_mj)::BIGINT AS known_mj,
    count(*) FILTER (energy_mj IS NULL) AS stretches_not_measured,
    sum(energy_estimate_mj)::BIGINT AS energy_estimate_mj,
    sum(lasted_ns / 3.6e12 * price_per_hour) AS device_cost
FROM drawn LEFT JOIN env USING (run_id, worker_id)
GROUP BY ALL
ORDER BY run_id, pool, engine, rungs, batch_size
