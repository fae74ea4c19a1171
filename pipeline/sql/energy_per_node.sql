-- Counted energy of each host by kind of domain (gpu, cpu, dram), gaps included, pauses of more than half an hour not; null where a part is missing
-- What a segment that was not measured used may stand in a gap, or nowhere: known_mj is what was counted at all.
-- A row without a kind is of workers that read no counter; a GPU that a worker held and nobody read is a device without counter.
WITH node AS (
    SELECT run_id, boot_id, any_value(host) AS host, any_value(node_id) AS node_id FROM env GROUP BY ALL
), held AS (
    SELECT DISTINCT run_id, boot_id, 'gpu:' || unnest(string_split(coalesce(gpus, device), ',')) AS domain
    FROM env
    WHERE boot_id IS NOT NULL
), part AS (
    SELECT run_id, boot_id, domain, energy_mj, true AS is_segment FROM segment WHERE segment_class <> 'off'
    UNION ALL
    SELECT run_id, boot_id, domain, NULL, false
    FROM held ANTI JOIN segment USING (run_id, boot_id, domain)
    WHERE domain NOT IN ('gpu:', 'gpu:cpu')
)
SELECT run_id, coalesce(host, boot_id) AS host, node_id, split_part(domain, ':', 1) AS kind,
    count(DISTINCT domain) AS devices,
    CASE WHEN bool_and(energy_mj IS NOT NULL) THEN sum(energy_mj)::BIGINT END AS energy_mj,
    CASE WHEN bool_and(energy_mj IS NOT NULL) THEN sum(energy_mj) / 3.6e9 END AS energy_kwh,
    sum(energy_mj)::BIGINT AS known_mj,
    count(*) FILTER (is_segment AND energy_mj IS NULL) AS segments_not_measured,
    count(*) FILTER (NOT is_segment) AS devices_without_counter
FROM part LEFT JOIN node USING (run_id, boot_id)
GROUP BY run_id, boot_id, host, node_id, kind
ORDER BY ALL
