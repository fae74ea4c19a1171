-- C3: nodes whose counters and declared rest do not add up to the node's own meter, recomputed from raw reads (no row: closed, or not checked)
-- Counters and cumulative meters are interpolated at both ends of a stretch, power is integrated by trapezoids.
WITH part AS (
    SELECT row_number() OVER () AS id, * FROM node_energy
), node AS (
    SELECT DISTINCT run_id, host, boot_id, meter FROM node_energy
), reading AS (  -- an import knows the host, a recorder which boot it read; of two at one time the smaller one
    SELECT r.run_id, node.boot_id, r.meter, feed, source, t_wall_ns, min(energy_mj) AS energy_mj, min(power_mw) AS power_mw,
        max(rest_mw) AS rest_mw
    FROM node_reading r JOIN node ON r.run_id = node.run_id AND r.meter = node.meter
        AND (r.boot_id = node.boot_id OR (r.boot_id IS NULL AND r.host = node.host))
    GROUP BY ALL
), cumulative AS (
    SELECT run_id, boot_id, '' AS meter, 'counter' AS source, domain AS name, t_mono_ns AS t, energy_mj FROM counter
    UNION ALL
    SELECT run_id, boot_id, meter, source, feed, t_wall_ns, energy_mj FROM reading WHERE energy_mj IS NOT NULL
), ends AS (
    SELECT id, run_id, boot_id, if(part = 'device', '', meter) AS meter, source, name, sign,
        CASE WHEN part = 'device' THEN if(sign < 0, t_open_mono_ns, t_close_mono_ns)
            ELSE if(sign < 0, t_open_wall_ns, t_close_wall_ns) END AS t
    FROM part, (SELECT unnest([-1, 1]) AS sign)
    WHERE part <> 'rest'
), grown AS (
    SELECT id, sum(sign * (lo.energy_mj + if(hi.t > lo.t,
        (hi.energy_mj - lo.energy_mj)::DOUBLE * (ends.t - lo.t) / (hi.t - lo.t), 0))) AS energy_mj
    FROM ends
    ASOF JOIN cumulative lo ON (ends.run_id, ends.boot_id, ends.meter, ends.source, ends.name)
        = (lo.run_id, lo.boot_id, lo.meter, lo.source, lo.name) AND ends.t >= lo.t
    ASOF JOIN cumulative hi ON (ends.run_id, ends.boot_id, ends.meter, ends.source, ends.name)
        = (hi.run_id, hi.boot_id, hi.meter, hi.source, hi.name) AND ends.t <= hi.t
    GROUP BY id
), slope AS (
    SELECT run_id, boot_id, meter, source, feed, t_wall_ns AS t0, power_mw AS p0,
        lead(t_wall_ns) OVER times AS t1, lead(power_mw) OVER times AS p1
    FROM reading
    WHERE power_mw IS NOT NULL
    WINDOW times AS (PARTITION BY run_id, boot_id, meter, source, feed ORDER BY t_wall_ns)
), inside AS (
    SELECT id, t0, p0, t1, p1, greatest(t0, t_open_wall_ns) AS b, least(t1, t_close_wall_ns) AS e
    FROM part JOIN slope ON (part.run_id, part.boot_id, part.meter, part.source, part.name)
        = (slope.run_id, slope.boot_id, slope.meter, slope.source, slope.feed)
        AND t0 < t_close_wall_ns AND t1 > t_open_wall_ns
    WHERE part = 'node'
), integral AS (
    SELECT id, sum((p0 + (p1 - p0)::DOUBLE * ((b - t0) + (e - t0)) / 2 / (t1 - t0)) * (e - b) / 1e9) AS energy_mj
    FROM inside
    GROUP BY id
), declared AS (  -- of several at one time the largest
    SELECT run_id, boot_id, meter, arg_max(rest_mw, (t_wall_ns, rest_mw)) AS rest_mw
    FROM reading
    GROUP BY ALL
), again AS (
    SELECT part.*, CASE WHEN part = 'rest'
        THEN (rest_mw::HUGEINT * (t_close_mono_ns - t_open_mono_ns) + 500000000) // 1000000000
        ELSE coalesce(grown.energy_mj, integral.energy_mj) END AS raw_mj
    FROM part LEFT JOIN grown USING (id) LEFT JOIN integral USING (id) LEFT JOIN declared USING (run_id, boot_id, meter)
), total AS (
    SELECT run_id, host || ' boot ' || boot_id || ' by ' || meter AS scope,
        sum(energy_mj) FILTER (part = 'node') AS expected_mj,
        sum(energy_mj) FILTER (part <> 'node') AS found_mj,
        sum(tolerance_mj) AS tolerance_mj
    FROM part
    GROUP BY ALL
)
SELECT run_id, host || ' boot ' || boot_id || ' by ' || meter AS scope,
    part || ' ' || name || ': not what the raw reads give' AS problem, raw_mj::BIGINT AS expected_mj, energy_mj AS found_mj
FROM again
WHERE raw_mj IS NULL OR abs(raw_mj - energy_mj) > 1
UNION ALL
SELECT run_id, scope, 'not the sum of its parts', total.expected_mj::BIGINT, closure.found_mj
FROM closure LEFT JOIN total USING (run_id, scope)
WHERE "check" = 'C3' AND closure.found_mj IS NOT NULL
    AND (closure.expected_mj, closure.found_mj, closure.tolerance_mj)
        IS DISTINCT FROM (total.expected_mj, total.found_mj, total.tolerance_mj)
UNION ALL
SELECT run_id, scope, 'residual beyond the tolerance', total.expected_mj::BIGINT, total.found_mj::BIGINT
FROM closure JOIN total USING (run_id, scope)
WHERE "check" = 'C3' AND closure.passed IS NOT NULL AND abs(total.found_mj - total.expected_mj) > total.tolerance_mj
ORDER BY ALL
