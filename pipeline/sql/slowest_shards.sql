-- The hundred slowest committed shards, against the median of their job
SELECT run_id, shard_id, worker_id, host, device, images_ok,
    (t_end_wall_ns - t_start_wall_ns) / 1e9 AS seconds,
    seconds / nullif(median(seconds) OVER (PARTITION BY run_id), 0) AS times_median,
    energy_mj
FROM attempt
WHERE outcome = 'committed'
ORDER BY seconds DESC, run_id, shard_id
LIMIT 100
