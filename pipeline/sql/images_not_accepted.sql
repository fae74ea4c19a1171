-- What images that nobody got cost: per job and status, images and their share of the energy of their shards; null where a part is missing
-- Quarantined images that were never drawn to the end have no share of their own: it cannot be told from their neighbours'.
WITH rejected AS (
    SELECT run_id, 'filtered' AS status, coalesce(images_filtered, 0) AS images, energy_filtered_mj AS share_mj,
        energy_mj, 1 AS place
    FROM attempt
    WHERE outcome = 'committed'
    UNION ALL
    SELECT run_id, 'quarantined', images_quarantined, energy_quarantined_mj, energy_mj, 2
    FROM attempt
    WHERE outcome = 'committed'
)
SELECT run_id, status, sum(images)::BIGINT AS images,
    CASE WHEN bool_and(energy_mj IS NOT NULL) THEN coalesce(sum(share_mj), 0)::BIGINT END AS energy_mj,
    CASE WHEN bool_and(energy_mj IS NOT NULL) THEN coalesce(sum(share_mj), 0) / nullif(sum(energy_mj), 0) END
        AS share_of_shards,
    coalesce(sum(share_mj), 0)::BIGINT AS known_mj,
    count(*) FILTER (energy_mj IS NULL) AS shards_not_measured
FROM rejected
GROUP BY run_id, status, place
ORDER BY run_id, place
