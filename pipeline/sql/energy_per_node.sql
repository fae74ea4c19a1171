-- Counted energy of each host by kind of domain (gpu, cpu, dram), job's gaps included, time between two runs not
WITH node AS (
    SELECT run_id, boot_id, any_value(host) AS host, any_value(node_id) AS node_id FROM env GROUP BY ALL
)
SELECT run_id, coalesce(host, boot_id) AS host, node_id, split_part(domain, ':', 1) AS kind,
    count(DISTINCT domain) AS devices,
    sum(energy_mj)::BIGINT AS energy_mj,
    sum(energy_mj) / 3.6e9 AS energy_kwh,
    count(*) FILTER (energy_mj IS NULL) AS segments_not_measured
FROM segment LEFT JOIN node USING (run_id, boot_id)
WHERE segment_class <> 'off' AND domain IS NOT NULL
GROUP BY run_id, boot_id, host, node_id, kind
ORDER BY ALL
