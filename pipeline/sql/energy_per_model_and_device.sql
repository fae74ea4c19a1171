-- Images and direct energy per accepted image by model and device (its name where it is known); energy is null where a shard's is
WITH job AS (
    SELECT run_id, any_value(model_name) AS model FROM env GROUP BY ALL
), named AS (
    SELECT run_id, worker_id, any_value(device_name) AS device_name FROM env GROUP BY ALL
), made AS (
    SELECT * REPLACE (coalesce(images_filtered, 0) AS images_filtered),
        coalesce(energy_filtered_mj, 0) + coalesce(energy_quarantined_mj, 0) AS rejected_mj
    FROM attempt
    WHERE outcome = 'committed'
), drawn AS (  -- device time: attempts of a worker overlap while one is stored
    SELECT run_id, attempt_id, sum(lasted_ns) / 1e9 AS seconds
    FROM (SELECT run_id, attempt_id, segment_id, max(t_close_mono_ns - t_open_mono_ns) AS lasted_ns
        FROM segment WHERE segment_class = 'shard' GROUP BY ALL)
    GROUP BY ALL
)
SELECT model, coalesce(device_name, device) AS device, energy_method,
    count(DISTINCT run_id) AS jobs,
    sum(images_ok)::BIGINT AS images,
    CASE WHEN bool_and(energy_mj IS NOT NULL) THEN sum(energy_mj)::BIGINT END AS energy_mj,
    CASE WHEN bool_and(energy_mj IS NOT NULL)
        THEN (sum(energy_mj) - sum(rejected_mj)) / nullif(sum(images_ok), 0) END AS direct_mj_per_image,
    sum(images_filtered)::BIGINT AS images_filtered,
    CASE WHEN bool_and(energy_mj IS NOT NULL) THEN sum(rejected_mj)::BIGINT END AS rejected_mj,
    sum(energy_mj)::BIGINT AS known_mj,
    count(*) FILTER (energy_mj IS NULL) AS shards_not_measured,
    sum(images_ok) / nullif(sum(drawn.seconds), 0) AS images_per_device_second
FROM made LEFT JOIN job USING (run_id) LEFT JOIN named USING (run_id, worker_id)
    LEFT JOIN drawn USING (run_id, attempt_id)
GROUP BY ALL
ORDER BY model, device
