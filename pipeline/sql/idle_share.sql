-- Time and energy by what workers did (shard, load, warmup, idle, loser, retry, gap) and their shares of the job
WITH stretch AS (
    SELECT run_id, segment_class,
        coalesce(segment_id::VARCHAR, boot_id || epoch || domain || t_open_mono_ns) AS id,
        sum(energy_mj) AS energy_mj,
        max(t_close_mono_ns - t_open_mono_ns) / 1e9 AS seconds,
        bool_or(energy_mj IS NULL) AS missing
    FROM segment
    WHERE segment_class <> 'off'
    GROUP BY ALL
), class AS (
    SELECT run_id, segment_class, sum(energy_mj) AS energy_mj, sum(seconds) AS seconds,
        count(*) FILTER (missing) AS segments_not_measured
    FROM stretch
    GROUP BY ALL
)
SELECT run_id, segment_class, seconds, energy_mj::BIGINT AS energy_mj,
    energy_mj / sum(energy_mj) OVER (PARTITION BY run_id) AS energy_share,
    segments_not_measured
FROM class
ORDER BY run_id, energy_mj DESC NULLS LAST, segment_class
