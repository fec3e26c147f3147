-- Runs for each inference request once its body is complete: notes how many rows it has for the access log, refuses too
-- many, and has a gRPC message name the model and version that Envoy chose.
--
-- The metadata of the route: rows_max, and row_bytes_max where a row of the model has a size.

local PEEKED_BYTES = 512
-- What a body has beside the values of its rows.
local BODY_BYTES_MAX = 65536
-- Parameters that change what a model server does, in place of what the model is asked.
local REFUSED = {"sequence_id", "sequence_start", "sequence_end", "priority", "timeout", "shared_memory_region",
                 "shared_memory_byte_size", "shared_memory_offset", "classification", "content_type"}

-- Reads a variable-length integer of Protocol Buffers; returns it and the position after it, nil where it is cut off.
local function read_varint(text, position)
  local value, factor = 0, 1
  for at = position, position + 8 do
    local byte = string.byte(text, at)
    if not byte then return nil end
    value = value + (byte % 128) * factor
    if byte < 128 then return value, at + 1 end
    factor = factor * 128
  end
  return nil
end

local function encode_field(number, text)
  local length = #text
  local size = length < 128 and string.char(length) or string.char(128 + length % 128, math.floor(length / 128))
  return string.char(8 * number + 2) .. size .. text
end

-- Calls `visit` with the number, start and length of each length-delimited field, until it returns a value.
local function find_field(text, position, stop, visit)
  while position < stop do
    local tag, after = read_varint(text, position)
    if not tag then return nil end
    local kind = tag % 8
    if kind == 2 then
      local length, start = read_varint(text, after)
      if not length then return nil end
      local found = visit((tag - kind) / 8, start, length)
      if found then return found end
      position = start + length
    elseif kind == 0 then
      local _, next_field = read_varint(text, after)
      if not next_field then return nil end
      position = next_field
    else
      return nil
    end
  end
  return nil
end

-- The first dimension of the first input: field 3 of field 5 of inference.ModelInferRequest.
local function read_grpc_rows(message)
  return find_field(message, 1, #message, function(number, start, length)
    if number ~= 5 then return nil end
    return find_field(message, start, start + length, function(inner, at)
      return inner == 3 and read_varint(message, at) or nil
    end)
  end)
end

local function read_grpc_version(message)
  return find_field(message, 1, #message, function(number, start, length)
    return number == 2 and length > 0 and string.sub(message, start, start + length - 1) or nil
  end)
end

local function refuse(handle, status, message)
  handle:streamInfo():dynamicMetadata():set("overnight", "refused", true)
  handle:respond({[":status"] = status}, message)
end

local function name_model(handle, body, model, version, is_renamed)
  local size = body:length()
  if size < 5 then return true end
  if string.byte(body:getBytes(0, 1)) ~= 0 then
    refuse(handle, "415", "The message must not be compressed, but is.")
    return false
  end
  local asked = not is_renamed and read_grpc_version(body:getBytes(5, math.min(size - 5, PEEKED_BYTES)))
  if asked and asked ~= version then
    refuse(handle, "400", "A version is named by the metadata overnight-version, got a message that "
        .. "names another one than the gateway chose. Leave model_version empty.")
    return false
  end
  local added = encode_field(1, model) .. encode_field(2, version or "")
  -- The last value of a field counts.
  local length = size - 5 + #added
  local prefix = string.char(0, math.floor(length / 16777216) % 256, math.floor(length / 65536) % 256,
                             math.floor(length / 256) % 256, length % 256)
  body:setBytes(prefix .. body:getBytes(5, size - 5) .. added)
  return true
end

local function find_refused_parameter(text)
  if not string.find(text, '"parameters"', 1, true) then return nil end
  for _, name in ipairs(REFUSED) do
    if string.find(text, '"' .. name .. '"%s*:') then return name end
  end
  return nil
end

local function check_size(handle, rows, size)
  local route = handle:metadata()
  local rows_max, row_bytes_max = route:get("rows_max"), route:get("row_bytes_max")
  if not rows and rows_max and row_bytes_max and size > BODY_BYTES_MAX + rows_max * row_bytes_max then
    refuse(handle, "413", "A request must have at most " .. rows_max .. " rows, got " .. size
        .. " bytes. Send fewer rows at once.")
    return false
  end
  if rows and rows_max and rows > rows_max then
    refuse(handle, "413", "A request must have at most " .. rows_max .. " rows, got " .. rows
        .. ". Send fewer rows at once.")
    return false
  end
  if rows and row_bytes_max and size > BODY_BYTES_MAX + rows * row_bytes_max then
    refuse(handle, "400", "The data must be the values of the shape, which says " .. rows
        .. " rows, got " .. size .. " bytes.")
    return false
  end
  return true
end

function envoy_on_request(handle)
  local length = handle:headers():get("inference-header-content-length")
  local body = handle:body()
  if not body then return end
  local rows
  local size = body:length()
  local method = string.match(handle:headers():get(":path") or "", "^/inference%.GRPCInferenceService/(%a+)$")
  if method == "ModelInfer" then
    rows = read_grpc_rows(body:getBytes(5, math.max(0, math.min(size - 5, PEEKED_BYTES))))
  elseif not method then
    rows = tonumber(string.match(body:getBytes(0, math.min(size, PEEKED_BYTES)), '"shape"%s*:%s*%[%s*(%d+)'))
  end
  if rows then handle:streamInfo():dynamicMetadata():set("overnight", "rows", rows) end
  -- Comes before all that reads the whole body, for which every other request waits.
  if not check_size(handle, rows, size) then return end
  if not method then
    local refused = find_refused_parameter(body:getBytes(0, math.min(size, tonumber(length) or size)))
    if refused then
      refuse(handle, "400", "The parameters of a request must be those of the protocol, got '"
          .. refused .. "'. Leave it out.")
      return
    end
  end
  if method and string.sub(method, 1, 5) == "Model" then
    local context = handle:filterContext()
    name_model(handle, body, context:get("model"), context:get("model_version"))
  end
end
