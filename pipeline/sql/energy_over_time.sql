-- Growth of each counter per minute, in watts averaged over the time between its reads in that minute
WITH step AS (
    SELECT run_id, boot_id, epoch, domain, t_wall_ns,
        energy_mj - lag(energy_mj) OVER reads AS energy_mj,
        t_mono_ns - lag(t_mono_ns) OVER reads AS elapsed_ns
    FROM (SELECT DISTINCT run_id, boot_id, epoch, domain, t_mono_ns, t_wall_ns, energy_mj FROM counter)
    WINDOW reads AS (PARTITION BY run_id, boot_id, epoch, domain ORDER BY t_mono_ns, energy_mj)
)
SELECT run_id, boot_id, domain, make_timestamp_ns(t_wall_ns // 60000000000 * 60000000000) AS minute,
    sum(energy_mj)::BIGINT AS energy_mj,
    sum(energy_mj) * 1e6 / nullif(sum(elapsed_ns), 0) AS watts
FROM step
WHERE energy_mj >= 0
GROUP BY ALL
ORDER BY ALL
