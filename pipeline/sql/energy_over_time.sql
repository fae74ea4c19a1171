-- Growth of each counter per minute, in watts averaged over the time between its reads in that minute; energy is null where the counter broke
-- A break is a reset, or a step that no device can make (as in closure_c1): what was used across it is not known.
WITH step AS (
    SELECT run_id, boot_id, domain, t_wall_ns,
        epoch > min(epoch) OVER (PARTITION BY run_id, boot_id, domain) AS is_later_epoch,
        energy_mj::HUGEINT - lag(energy_mj) OVER reads AS energy_mj,
        t_mono_ns - lag(t_mono_ns) OVER reads AS elapsed_ns
    FROM (SELECT DISTINCT run_id, boot_id, epoch, domain, t_mono_ns, t_wall_ns, energy_mj FROM counter)
    WINDOW reads AS (PARTITION BY run_id, boot_id, epoch, domain ORDER BY t_mono_ns, energy_mj)
), judged AS (
    SELECT *, CASE WHEN energy_mj IS NULL THEN is_later_epoch
        ELSE energy_mj < 0 OR energy_mj * 1000000 > 5000::HUGEINT * (elapsed_ns + 10000000000) END AS is_break
    FROM step
    WHERE energy_mj IS NOT NULL OR is_later_epoch  -- the first reading of all only opens the first step
)
SELECT run_id, boot_id, domain, make_timestamp_ns(t_wall_ns // 60000000000 * 60000000000) AS minute,
    CASE WHEN NOT bool_or(is_break) THEN sum(energy_mj)::BIGINT END AS energy_mj,
    sum(energy_mj) FILTER (NOT is_break) * 1e6 / nullif(sum(elapsed_ns) FILTER (NOT is_break), 0) AS watts,
    (sum(energy_mj) FILTER (NOT is_break))::BIGINT AS known_mj,
    count(*) FILTER (is_break) AS breaks
FROM judged
GROUP BY ALL
ORDER BY ALL
