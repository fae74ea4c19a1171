-- Time and energy by what workers did (shard, load, warmup, idle, loser, retry, gap) and their shares of the job; null where a part is missing
WITH stretch AS (
    SELECT run_id, segment_class,
        coalesce(segment_id::VARCHAR, boot_id || epoch || domain || t_open_mono_ns) AS id,
        sum(energy_mj) AS known_mj,
        max(t_close_mono_ns - t_open_mono_ns) / 1e9 AS seconds,
        bool_or(energy_mj IS NULL) AS missing
    FROM segment
    WHERE segment_class <> 'off'
    GROUP BY ALL
), class AS (
    SELECT run_id, segment_class, sum(known_mj) AS known_mj, sum(seconds) AS seconds,
        count(*) FILTER (missing) AS segments_not_measured
    FROM stretch
    GROUP BY ALL
)
SELECT run_id, segment_class, seconds,
    CASE WHEN segments_not_measured = 0 THEN known_mj::BIGINT END AS energy_mj,
    CASE WHEN sum(segments_not_measured) OVER job = 0 THEN known_mj / sum(known_mj) OVER job END AS energy_share,
    known_mj::BIGINT AS known_mj,
    segments_not_measured
FROM class
WINDOW job AS (PARTITION BY run_id)
ORDER BY run_id, energy_mj DESC NULLS LAST, class.known_mj DESC NULLS LAST, segment_class
