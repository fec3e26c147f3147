-- Runs for each inference request before its body is read: the API key, the encoding of the body, and the path of the
-- version that Envoy chose. Keys are known by their SHA-256 alone, so that no file of the gateway holds one.
--
-- The metadata of the route: endpoint, needs_key, and one entry for the digest of each key that it accepts.
-- The context of the weighted cluster: version, path, and canary where a rollout is under way.

local band, bor, bxor, bnot = bit.band, bit.bor, bit.bxor, bit.bnot
local rshift, lshift, ror, tohex = bit.rshift, bit.lshift, bit.ror, bit.tohex

local KEY_BYTES_MAX = 512
local DIGESTS_KEPT_MAX = 1000
local REMOVED = {"authorization", "cookie", "overnight-version", "overnight-shadow", "x-envoy-upstream-rq-timeout-ms"}

-- The constants of SHA-256 (FIPS 180-4): the first 32 bits of the fractional parts of cube and square roots of primes.
local function fraction_bits(root)
  return bit.tobit(math.floor((root - math.floor(root)) * 4294967296))
end

local K, INITIAL = {}, {}
do
  local candidate = 2
  while #K < 64 do
    local is_prime = true
    for divisor = 2, math.floor(math.sqrt(candidate)) do
      if candidate % divisor == 0 then is_prime = false break end
    end
    if is_prime then
      K[#K + 1] = fraction_bits(candidate ^ (1 / 3))
      if #INITIAL < 8 then INITIAL[#INITIAL + 1] = fraction_bits(candidate ^ 0.5) end
    end
    candidate = candidate + 1
  end
end

local function sha256(text)
  local length = #text
  local padded = text .. "\128" .. string.rep("\0", (55 - length) % 64) .. "\0\0\0\0"
      .. string.char(band(rshift(length, 21), 255), band(rshift(length, 13), 255), band(rshift(length, 5), 255),
                     band(lshift(length, 3), 255))
  local hash = {unpack(INITIAL)}
  local w = {}
  for block = 1, #padded, 64 do
    for i = 0, 15 do
      local a, b, c, d = string.byte(padded, block + 4 * i, block + 4 * i + 3)
      w[i] = bor(lshift(a, 24), lshift(b, 16), lshift(c, 8), d)
    end
    for i = 16, 63 do
      local s0 = bxor(ror(w[i - 15], 7), ror(w[i - 15], 18), rshift(w[i - 15], 3))
      local s1 = bxor(ror(w[i - 2], 17), ror(w[i - 2], 19), rshift(w[i - 2], 10))
      w[i] = bit.tobit(w[i - 16] + s0 + w[i - 7] + s1)
    end
    local a, b, c, d, e, f, g, h = unpack(hash)
    for i = 0, 63 do
      local s1 = bxor(ror(e, 6), ror(e, 11), ror(e, 25))
      local choice = bxor(band(e, f), band(bnot(e), g))
      local t1 = h + s1 + choice + K[i + 1] + w[i]
      local s0 = bxor(ror(a, 2), ror(a, 13), ror(a, 22))
      local majority = bxor(band(a, b), band(a, c), band(b, c))
      h, g, f, e, d, c, b, a = g, f, e, bit.tobit(d + t1), c, b, a, bit.tobit(t1 + s0 + majority)
    end
    for i, value in ipairs({a, b, c, d, e, f, g, h}) do hash[i] = bit.tobit(hash[i] + value) end
  end
  local digits = {}
  for i = 1, 8 do digits[i] = tohex(hash[i]) end
  return table.concat(digits)
end

-- The digests of keys that were accepted, so that a steady caller costs no hashing.
local digests, digests_count = {}, 0

local function refuse(handle, status, message)
  local headers = {[":status"] = status, ["content-type"] = "application/json"}
  if status == "401" then headers["www-authenticate"] = "Bearer" end
  handle:streamInfo():dynamicMetadata():set("overnight", "refused", true)
  handle:respond(headers, message)
end

local function check_key(handle, headers, route)
  local authorization = headers:get("authorization")
  if not authorization or authorization == "" then
    refuse(handle, "401", "A request must have the header Authorization: Bearer KEY, got none.")
    return false
  end
  local scheme, key = string.match(authorization, "^(%a+)%s+(.-)%s*$")
  local digest = nil
  if scheme and string.lower(scheme) == "bearer" and #key <= KEY_BYTES_MAX then
    digest = digests[key] or sha256(key)
  end
  if digest and route:get(digest) then
    if not digests[key] then
      if digests_count >= DIGESTS_KEPT_MAX then digests, digests_count = {}, 0 end
      digests[key], digests_count = digest, digests_count + 1
    end
    return true
  end
  if digest and handle:virtualHost():metadata():get(digest) then
    refuse(handle, "403", "The API key must be one that the endpoint accepts, got another key. Ask for access.")
  else
    refuse(handle, "401",
           "The header Authorization must be 'Bearer KEY' with an API key of this gateway, got another key.")
  end
  return false
end

function envoy_on_request(handle)
  local context = handle:filterContext()
  local headers = handle:headers()
  local route = handle:metadata()
  local endpoint = route:get("endpoint")
  local metadata = handle:streamInfo():dynamicMetadata()
  metadata:set("overnight", "endpoint", endpoint)
  if route:get("needs_key") and not check_key(handle, headers, route) then return end
  local encoding = headers:get("content-encoding")
  if encoding and string.lower(encoding) ~= "identity" then
    refuse(handle, "415", "The body must not be compressed, got '" .. string.sub(encoding, 1, 100) .. "'.")
    return
  end
  if context:get("canary") then metadata:set("overnight", "canary", true) end
  for _, name in ipairs(REMOVED) do headers:remove(name) end
  headers:replace("overnight-endpoint", endpoint)
  if context:get("has_shadow") then headers:replace("overnight-chosen", context:get("version")) end
  local path = context:get("path")
  if path then headers:replace(":path", path) end
end


-- Statuses that mean the same to a caller from a model server as from the gateway. All others become 502.
local FORWARDED = {["400"] = true, ["403"] = true, ["401"] = true, ["408"] = true, ["413"] = true, ["415"] = true,
                   ["422"] = true, ["429"] = true, ["500"] = true, ["502"] = true, ["503"] = true, ["504"] = true}
local ERROR_BYTES_MAX = 2000

local function quote(text)
  return '"' .. string.gsub(text, '[%c"\\]', function(character)
    return string.format("\\u%04x", string.byte(character))
  end) .. '"'
end

-- Leaves out addresses and paths, which callers must not see.
local function remove_addresses(text)
  text = string.gsub(text, "%a[%w+.-]*://[^%s'\"\\]+", "(left out)")
  text = string.gsub(text, "%f[%w/]%d+%.%d+%.%d+%.%d+[:%d]*", "(left out)")
  text = string.gsub(text, "%f[%w][%w_.-]+:%d%d+%f[^%d]", "(left out)")
  text = string.gsub(text, "%f[%w_.</]/[%w_.@+-]+/[%w_.@+/-]*", "(left out)")
  return text
end

-- Makes each error of a model server {"error": "..."}, whatever its format.
local function convert_error(handle, headers, status)
  if string.find(headers:get("content-type") or "", "^application/grpc") then return end
  local body = handle:body()
  local text = body and body:getBytes(0, math.min(body:length(), ERROR_BYTES_MAX)) or ""
  local reason = remove_addresses(text)
  if status == "404" then
    reason = '{"error": ' .. quote("The model server must have the model, got 404: " .. reason
        .. ". Deploy the version again.") .. "}"
    status = "503"
  elseif not string.find(reason, '^%s*{%s*"error"%s*:%s*"') or not string.find(reason, "}%s*$") then
    local detail = string.match(reason, '^%s*{%s*"detail"%s*:%s*"(.-)"%s*}%s*$')
    reason = '{"error": ' .. quote(detail or (reason ~= "" and reason) or "The model server gave no reason.") .. "}"
  end
  if not FORWARDED[status] then status = "502" end
  if body then body:setBytes(reason) end
  -- Headers that were read before a body are no longer valid.
  headers = handle:headers()
  headers:replace(":status", status)
  headers:replace("content-type", "application/json")
end

-- Names the version that answered, and keeps the addresses of model servers from callers.
function envoy_on_response(handle)
  local headers = handle:headers()
  local attempt = headers:get("x-envoy-attempt-count")
  if attempt then
    -- Only an answer of a server has a service time.
    if headers:get("x-envoy-upstream-service-time") and not headers:get("overnight-version") then
      local context = handle:filterContext()
      headers:replace("overnight-version", context:get("version " .. attempt) or context:get("version"))
    end
    headers:remove("x-envoy-attempt-count")
    headers:remove("x-envoy-upstream-service-time")
    headers:remove("server")
    local status = headers:get(":status")
    if status ~= "200" then convert_error(handle, headers, status) end
  end
end
