-- Metered kWh, and money and grams of CO2e with PUE, per job and image: --param price_per_kwh=0.30 gco2_per_kwh=400 pue=1.2
-- PUE is declared, not measured: it multiplies money and grams, never energy. All null where an image's full energy is missing.
WITH job AS (
    SELECT run_id, count(*) AS images,
        CASE WHEN bool_and(energy_full_mj IS NOT NULL) THEN sum(energy_full_mj) / 3.6e9 END AS metered_kwh,
        count(*) FILTER (energy_full_mj IS NULL) AS images_not_measured
    FROM image
    GROUP BY ALL
)
SELECT run_id, images, metered_kwh, $pue AS declared_pue,
    metered_kwh * $pue * $price_per_kwh AS cost_with_pue,
    metered_kwh * $pue * $gco2_per_kwh AS gco2e_with_pue,
    metered_kwh * $pue * $price_per_kwh / images AS cost_per_image_with_pue,
    metered_kwh * $pue * $gco2_per_kwh / images AS gco2e_per_image_with_pue,
    images_not_measured
FROM job
ORDER BY run_id
