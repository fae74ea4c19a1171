-- Money and grams of CO2e per job and image: --param price_per_kwh=0.30 --param gco2_per_kwh=400 --param pue=1.2
WITH job AS (
    SELECT run_id, count(*) AS images,
        CASE WHEN bool_and(energy_full_mj IS NOT NULL) THEN sum(energy_full_mj) / 3.6e9 END * $pue AS kwh
    FROM image
    GROUP BY ALL
)
SELECT run_id, images, kwh,
    kwh * $price_per_kwh AS cost,
    kwh * $gco2_per_kwh AS gco2e,
    kwh * $price_per_kwh / images AS cost_per_image,
    kwh * $gco2_per_kwh / images AS gco2e_per_image
FROM job
ORDER BY run_id
