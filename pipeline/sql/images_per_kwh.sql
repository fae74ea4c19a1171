-- Images per kilowatt-hour and millijoules per image, direct and full; null where something was not measured
SELECT run_id, count(*) AS images,
    CASE WHEN bool_and(energy_direct_mj IS NOT NULL) THEN sum(energy_direct_mj) / count(*) END AS direct_mj_per_image,
    CASE WHEN bool_and(energy_full_mj IS NOT NULL) THEN sum(energy_full_mj) / count(*) END AS full_mj_per_image,
    CASE WHEN bool_and(energy_direct_mj IS NOT NULL) THEN count(*) * 3.6e9 / nullif(sum(energy_direct_mj), 0) END
        AS images_per_kwh_direct,
    CASE WHEN bool_and(energy_full_mj IS NOT NULL) THEN count(*) * 3.6e9 / nullif(sum(energy_full_mj), 0) END
        AS images_per_kwh_full,
    CASE WHEN bool_and(energy_estimate_mj IS NOT NULL) THEN sum(energy_estimate_mj) / count(*) END AS estimate_mj_per_image,
    sum(energy_direct_mj)::BIGINT AS known_direct_mj,
    count(*) FILTER (energy_direct_mj IS NULL) AS images_not_measured
FROM image
GROUP BY run_id
ORDER BY run_id
