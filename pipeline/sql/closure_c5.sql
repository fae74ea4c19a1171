-- C5: images, shards and attempts that break "one winning attempt each, its segments, every loser booked" (no row: closed)
WITH charged AS (
    SELECT run_id, shard_id, attempt_id,
        count(DISTINCT segment_id) FILTER (segment_class = 'shard') AS shard_segments,
        count(DISTINCT segment_id) FILTER (segment_class IN ('loser', 'retry')) AS waste_segments
    FROM segment
    WHERE attempt_id IS NOT NULL
    GROUP BY ALL
), made AS (
    SELECT run_id, shard_id, attempt_id, count(*) AS images FROM image GROUP BY ALL
)
SELECT run_id, shard_id, attempt_id, 'an image stands twice: ' || prompt_id || ' ' || image_index AS problem
FROM (SELECT run_id, prompt_id, image_index, min(shard_id) AS shard_id, min(attempt_id) AS attempt_id
    FROM image GROUP BY run_id, prompt_id, image_index HAVING count(*) > 1)
UNION ALL
SELECT run_id, shard_id, NULL, 'committed attempts: ' || count(*) FILTER (outcome = 'committed')
FROM attempt
GROUP BY run_id, shard_id
HAVING count(*) FILTER (outcome = 'committed') > 1
UNION ALL
SELECT run_id, shard_id, attempt_id, 'attempt rows: ' || count(*)
FROM attempt
GROUP BY run_id, shard_id, attempt_id
HAVING count(*) > 1
UNION ALL
SELECT run_id, shard_id, attempt_id, 'images without a committed attempt'
FROM made ANTI JOIN (FROM attempt WHERE outcome = 'committed') USING (run_id, shard_id, attempt_id)
UNION ALL
SELECT run_id, shard_id, attempt_id,
    'images: ' || coalesce(images, 0) || ', the commit says ' || coalesce(images_ok, 0)
FROM attempt LEFT JOIN made USING (run_id, shard_id, attempt_id)
WHERE outcome = 'committed' AND coalesce(images, 0) <> images_ok
UNION ALL
SELECT run_id, shard_id, attempt_id, outcome || ' attempt with ' || coalesce(shard_segments, 0) || ' shard segments and '
    || coalesce(waste_segments, 0) || ' of waste'
FROM attempt LEFT JOIN charged USING (run_id, shard_id, attempt_id)
WHERE CASE WHEN outcome = 'committed' THEN coalesce(shard_segments, 0) = 0  -- one for each sealed part, and its own
    ELSE coalesce(shard_segments, 0) <> 0 OR coalesce(waste_segments, 0) = 0 END
UNION ALL
SELECT run_id, shard_id, attempt_id, 'segments of an attempt that is not in the attempt table'
FROM charged ANTI JOIN attempt USING (run_id, shard_id, attempt_id)
ORDER BY ALL
