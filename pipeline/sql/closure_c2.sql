-- C2: shards whose images do not add up to their segments, and jobs whose images do not add up to everything (no row: closed)
WITH shard AS (
    SELECT run_id, shard_id, attempt_id,
        CASE WHEN bool_and(energy_mj IS NOT NULL) THEN sum(energy_mj) END AS energy_mj
    FROM segment
    WHERE segment_class = 'shard'
    GROUP BY ALL
), rejected AS (
    SELECT run_id, shard_id, attempt_id,
        coalesce(energy_filtered_mj, 0) + coalesce(energy_quarantined_mj, 0) AS rejected_mj,
        coalesce(energy_filtered_mj, 0) AS filtered_mj, coalesce(images_filtered, 0) AS filtered
    FROM attempt
    WHERE outcome = 'committed'
), direct AS (
    SELECT run_id, shard_id, attempt_id,
        CASE WHEN bool_and(energy_direct_mj IS NOT NULL) THEN sum(energy_direct_mj) END
            + coalesce(any_value(rejected_mj), 0) AS energy_mj,
        bool_or(energy_direct_mj IS NULL) AND bool_or(energy_direct_mj IS NOT NULL) AS partly,
        max(energy_direct_mj) - min(energy_direct_mj) AS spread_mj,
        -- an image that was filtered used as much as one that was accepted
        any_value(filtered_mj) NOT BETWEEN any_value(filtered) * (min(energy_direct_mj) - 1)
            AND any_value(filtered) * max(energy_direct_mj) AS uneven
    FROM image LEFT JOIN rejected USING (run_id, shard_id, attempt_id)
    GROUP BY ALL
), everything AS (
    SELECT run_id,
        coalesce(sum(energy_mj) FILTER (segment_class <> 'off'), 0) AS energy_mj,
        bool_and(energy_mj IS NOT NULL) AS complete
    FROM segment
    GROUP BY ALL
), whole AS (
    SELECT run_id,
        CASE WHEN bool_and(energy_full_mj IS NOT NULL) THEN sum(energy_full_mj) END AS energy_mj,
        bool_or(energy_full_mj IS NULL) AND bool_or(energy_full_mj IS NOT NULL) AS partly,
        bool_or(energy_full_mj < energy_direct_mj) AS below_direct
    FROM image
    GROUP BY ALL
)
SELECT run_id, shard_id, attempt_id, 'direct' AS what,
    shard.energy_mj::BIGINT AS expected_mj, direct.energy_mj::BIGINT AS found_mj
FROM direct LEFT JOIN shard USING (run_id, shard_id, attempt_id)
WHERE direct.energy_mj IS DISTINCT FROM shard.energy_mj OR partly OR spread_mj > 1 OR uneven
UNION ALL
SELECT run_id, shard_id, attempt_id, 'attempt', shard.energy_mj::BIGINT, attempt.energy_mj::BIGINT
FROM attempt LEFT JOIN shard USING (run_id, shard_id, attempt_id)
WHERE outcome = 'committed' AND attempt.energy_mj IS DISTINCT FROM shard.energy_mj
UNION ALL
SELECT run_id, NULL, NULL, 'full', everything.energy_mj::BIGINT, whole.energy_mj::BIGINT
FROM whole LEFT JOIN everything USING (run_id)
WHERE partly OR below_direct OR whole.energy_mj <> everything.energy_mj
    OR (complete AND whole.energy_mj IS NULL)
ORDER BY ALL
