-- C1: counters whose segments and gaps do not add up to their growth, recomputed from raw reads (no row: closed)
-- A step is growth unless it is negative or faster than 5 kW over its time and 10 s: there the counter was reset.
WITH reading AS (
    SELECT DISTINCT run_id, boot_id, epoch, domain, t_mono_ns, energy_mj FROM counter
), step AS (
    SELECT run_id, boot_id, epoch, domain,
        energy_mj::HUGEINT - lag(energy_mj) OVER reads AS energy_mj,
        t_mono_ns - lag(t_mono_ns) OVER reads AS elapsed_ns
    FROM reading
    WINDOW reads AS (PARTITION BY run_id, boot_id, epoch, domain ORDER BY t_mono_ns, energy_mj)
), grown AS (
    SELECT run_id, boot_id, epoch, domain,
        coalesce(sum(energy_mj) FILTER (
            energy_mj >= 0 AND energy_mj * 1000000 <= 5000::HUGEINT * (elapsed_ns + 10000000000)), 0) AS energy_mj
    FROM step
    GROUP BY ALL
), held AS (
    SELECT run_id, boot_id, epoch, domain, coalesce(sum(energy_mj), 0) AS energy_mj
    FROM segment
    WHERE domain IS NOT NULL
    GROUP BY ALL
)
SELECT run_id, boot_id, epoch, domain, grown.energy_mj::BIGINT AS expected_mj, held.energy_mj::BIGINT AS found_mj
FROM grown FULL JOIN held USING (run_id, boot_id, epoch, domain)
WHERE coalesce(grown.energy_mj, 0) <> coalesce(held.energy_mj, 0)
ORDER BY ALL
